"""A separate random generator for every sample and purpose: no result depends on what was sampled before."""

import hashlib

import torch


def sample_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """The generator of one sample for one purpose; a function of its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
