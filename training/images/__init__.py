"""Image models: sampling them to folders, and judging them by likelihood and by the quality of their samples."""
