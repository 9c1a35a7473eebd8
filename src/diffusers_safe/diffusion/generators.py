"""A generator of its own for every draw of training, so that draws depend on nothing that came before them."""

import hashlib

import torch


def sample_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """The generator of one sample's draws for one purpose. It depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
