"""The networks, `dit` for text and `unet` for images, and what they are made of."""
