"""The engine of every training: options, the loop, sources of samples, checkpoints, log, plan, output."""
