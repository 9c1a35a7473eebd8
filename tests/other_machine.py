"""Arithmetic of another machine, for `OTHER_MACHINE=1 make test`: what rounding may depend on, it does depend on here.

On a real one, which tests fail is luck: it depends on the CPU's paths through a matrix product and on the length of a
file's header, which decides how the weights lie in memory. Here the last bits of every linear layer and convolution
follow from the alignment of the weights, the size of the batch and the number of threads, safetensors files have
headers of other lengths, and gradients that are zero up to rounding are zero. So a test that wants equal bits where
only closeness is promised, or wants such weights to move, fails on every machine.
"""

import json
import struct
import zlib
from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional


def install() -> None:
    for name in ("linear", "conv2d"):
        setattr(functional, name, _rounded_otherwise(getattr(functional, name)))
    functional.scaled_dot_product_attention = _exact_for_one_key(functional.scaled_dot_product_attention)
    safetensors.torch.serialize_file = _with_another_header(safetensors.torch.serialize_file)


def _rounded_otherwise(operation):
    def other(inputs, weight, *args, **kwargs):
        result = operation(inputs, weight, *args, **kwargs)
        if result.device.type != "cpu" or not result.is_floating_point():
            return result
        place = (weight.data_ptr() % 64, inputs.numel(), torch.get_num_threads())
        return result * (1 + zlib.crc32(repr(place).encode()) % 4 * torch.finfo(result.dtype).eps)

    return other


def _exact_for_one_key(attention):
    def other(query, key, value, *args, **kwargs):
        if query.shape == key.shape == value.shape and key.shape[-2] == 1:
            return value + 0 * (query + key)  # the softmax of one number is 1, whatever it is
        return attention(query, key, value, *args, **kwargs)

    return other


def _with_another_header(serialize_file):
    """The format allows spaces after a header; the tensors begin at any multiple of 8 bytes."""

    def other(tensors, filename, metadata=None):
        serialize_file(tensors, filename, metadata)
        content = Path(filename).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, values = content[8 : 8 + length], content[8 + length :]
        names = sorted(json.loads(header))  # the same file has the same header in every run
        header += b" " * (8 * (zlib.crc32(repr(names).encode()) % 8))
        Path(filename).write_bytes(struct.pack("<Q", len(header)) + header + values)

    return other
