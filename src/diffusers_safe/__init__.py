"""Keep unwanted concepts out of text-to-image diffusion models."""
