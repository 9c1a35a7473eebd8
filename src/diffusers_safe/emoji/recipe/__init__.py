"""Training of the embedded models and their judges from the sprites.

`python -m diffusers_safe.emoji.recipe --help` lists the stages and settings.
"""
