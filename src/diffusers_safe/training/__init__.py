"""Training: arguments, the loop, checkpoints, and the objectives."""
