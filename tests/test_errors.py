"""Memory that runs out becomes an error for people; everything else stays what it is."""

import pickle

import pytest
import torch

from rlcs.errors import NEED_LESS, OutOfMemory, TrainingError, out_of_memory_in, shortage

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which "
    "1.20 GiB is free. Process 7 has 22.48 GiB memory in use. Of the allocated memory 18.00 GiB is allocated "
    "by PyTorch, and 3.10 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
FULL = "2.50 GB were requested, 1.20 GB of 23.69 GB were free, 3.10 GB more are held in pieces"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (CUDA, f"GPU memory ran out: {FULL}"),
        ("HIP out of memory. Tried to allocate 512.00 MiB.", "GPU memory ran out: 0.50 GB were requested"),
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", "GPU memory ran out"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "GPU memory ran out"),
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
            "main memory ran out: 8.00 GB were requested",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` "
            "when initializing the engine.",
            "vLLM has too little memory for its cache of keys and values: ValueError: No available memory",
        ),
        (
            "INFO ready\nValueError: Free memory on device (3.2/79.1 GiB) on startup is less than desired "
            "GPU memory utilization (0.9, 71.2 GiB).\nINFO bye",
            "keys and values: ValueError: Free memory on device (3.2/79.1 GiB)",
        ),
    ],
)  # fmt: skip
def test_what_a_message_says_about_memory(message, says):
    assert says in shortage(message)
    assert "INFO" not in shortage(message)


@pytest.mark.parametrize(
    "message", ["", "mat1 and mat2 shapes cannot be multiplied", "[../gloo] Connection closed by peer"]
)
def test_other_messages_are_left_alone(message):
    assert shortage(message) == ""
    with pytest.raises(RuntimeError) as caught, out_of_memory_in("update"):
        raise RuntimeError(message)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize(
    ("run_out", "says"),
    [
        (lambda: torch.empty(1 << 50).byte(), "main memory ran out: 4,194,304.00 GB were requested"),
        (lambda: bytearray(1 << 60), "the memory of Python ran out"),
    ],
    ids=["torch", "python"],
)  # fmt: skip
def test_a_real_allocation_that_is_too_large_names_its_phases(run_out, says):
    with (
        pytest.raises(OutOfMemory) as caught,
        out_of_memory_in("sft", fix="do this"),
        out_of_memory_in("update"),
    ):
        run_out()
    assert (caught.value.what, caught.value.where, caught.value.fix) == (says, "sft: update", "do this")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (as ranks send it)
    assert str(again) == str(caught.value) == f"sft: update: {says}\n  -> do this"


def test_the_inner_advice_stays_where_the_outer_phase_has_none():
    with pytest.raises(OutOfMemory) as caught, out_of_memory_in(""), out_of_memory_in("", fix="inner"):
        raise torch.OutOfMemoryError(CUDA)
    assert (caught.value.where, caught.value.fix) == ("", "inner")
    with pytest.raises(OutOfMemory) as caught, out_of_memory_in("a"):
        raise torch.OutOfMemoryError(CUDA)
    assert caught.value.fix == NEED_LESS
    with pytest.raises(TrainingError), out_of_memory_in("a"):
        raise TrainingError("out of memory of the past")
