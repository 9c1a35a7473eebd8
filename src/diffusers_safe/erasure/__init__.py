"""Erasure: `erase()`, what `train_sdd.py` and `train_esd.py` run, its plan and its result."""
