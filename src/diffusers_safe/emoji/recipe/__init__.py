"""Trains the embedded models and their judges from nothing but the sprites.

`python -m diffusers_safe.emoji.recipe --help` has the stages and settings.
"""
