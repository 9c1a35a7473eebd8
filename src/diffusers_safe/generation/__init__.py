"""Seeded images with a manifest: prompts, models, and the images that come of them."""
