"""Writes tensors in the format of safetensors, with a checksum and without reading the file again.

The library's own writer takes a path and gives no checksum.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import TensorSpec
from torch import Tensor

from rlcs.storage import FileSum, HashingWriter


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileSum:
    """Write tensors and sync them to disk; those of a GPU pass main memory one at a time. Raises OSError."""
    # By size of their numbers, so that each tensor begins at a multiple of it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with HashingWriter(path) as file:
        file.write(_header({name: tensors[name] for name in names}))
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        return file.sum


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The size of the header, and the header: names, formats, shapes and places of all tensors."""
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        # The address is not used; the library knows its names of the formats.
        spec = TensorSpec(dtype=dtype, shape=shape, data_ptr=1, data_len=tensor.nbytes)
        entries[name] = {"dtype": spec.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
