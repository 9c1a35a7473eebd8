"""Distillation: students with fewer blocks, trained on their teacher and on images (`train_distill.py`)."""
