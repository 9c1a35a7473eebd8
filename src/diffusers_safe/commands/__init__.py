"""The commands of `diffusers-safe` that belong to no part of the package alone."""
