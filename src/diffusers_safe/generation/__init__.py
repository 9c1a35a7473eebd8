"""Seeded images with a manifest: prompts, models, and the images they generate."""
