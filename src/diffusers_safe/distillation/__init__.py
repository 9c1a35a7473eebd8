"""Distillation: students with fewer blocks, trained on their teacher and on pictures (`train_distill.py`)."""
