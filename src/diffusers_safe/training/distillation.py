"""From a teacher and captioned pictures to a smaller student: what `train_distill.py` runs."""
