"""What requests and answers look like: `base` for all, `openai` for those in its shapes, the rest for their routes."""
