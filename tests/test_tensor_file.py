"""Files of tensors: what safetensors reads in them, and their checksums."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlcs.model.tensor_file import write_tensors
from rlcs.storage import file_sum

TYPES = (torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16)
TYPES += (torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_file_is_what_the_library_writes_byte_for_byte(tmp_path, dtype):
    values = torch.arange(12) % 3
    tensors = {"b": values.reshape(3, 4), "a": values[0], 'ü"': values[:0].reshape(0, 4), "c": values}
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    written = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written == file_sum(tmp_path / "ours")


def test_types_and_views_may_be_mixed(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": whole.T, "column": whole[:, 1], "none": whole[:0], "flag": torch.tensor([True])}
    tensors |= {"half": whole.bfloat16()[1], "odd": torch.arange(3, dtype=torch.int8)}
    write_tensors(tmp_path / "f", tensors)
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_more_than_one_write_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("rlcs.storage._WRITTEN_AT_ONCE", 100)
    tensors = {"a": torch.arange(1000.0)}
    assert write_tensors(tmp_path / "f", tensors) == file_sum(tmp_path / "f")
    assert torch.equal(load_file(tmp_path / "f")["a"], tensors["a"])
