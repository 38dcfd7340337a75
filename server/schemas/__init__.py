"""What requests and answers look like: `base` for all of them, `text` and `images` for their routes."""
