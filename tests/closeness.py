"""How tests compare what models compute.

Bits are compared only for the same computation on the same tensors in one process, for copies of stored bytes, and
where the product promises them: a run resumed, restarted or split over processes on one machine. Everything else is
compared with `difference`: a processor may take another path through a matrix product for another batch size or number
of threads, and for weights that were loaded (safetensors maps files into memory, aligned to 8 bytes) instead of made
(aligned to 64). `make test-portable` shows which tests forget that.
"""

import re

import numpy as np
import torch


# Relative, float32. Rounding was 3e-6 at most where it was measured, after several denoising steps; what a test looks
# for is a hundred times this or more.
ROUNDING = 1e-4

# Attention from one place to itself alone, as in the middle of the tiny models (1 x 1), is the same whatever its query
# and key are. Their gradient is exactly zero on some processors, and rounding, which Adam turns into steps, on others.
_NO_GRADIENT = re.compile(r"mid_block\..*\.attn1\.to_[qk]\.")


def difference(actual, expected) -> float:
    """The largest difference of two tensors or arrays, relative to the largest absolute value of `expected`."""
    actual, expected = (np.asarray(_array(values), dtype=np.float64) for values in (actual, expected))
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    scale = np.abs(expected).max()
    assert scale > 0, "nothing to compare: all values are 0"
    largest = np.abs(actual - expected).max() / scale
    return float("inf") if np.isnan(largest) else float(largest)


def _array(values):
    return values.detach().cpu().double().numpy() if torch.is_tensor(values) else values


def trained(before: dict, after: dict, selected) -> set[str]:
    """The names of the tensors that training changed, and of those of `selected` that have no gradient: what equals
    `set(selected)` after a training that changed all it should and nothing else."""
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return changed | {name for name in selected if _NO_GRADIENT.search(name)}
