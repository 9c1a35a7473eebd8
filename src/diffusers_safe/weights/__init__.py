"""Which weights train, and their values around one resident denoiser."""
