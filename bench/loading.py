"""`python -m bench.loading`: the most memory that all ranks of a node take while a sharded model is loaded.

A random Qwen2.5-VL-3B in the published layout (bfloat16, files of safetensors) is written to a folder,
and `torchrun` starts ranks that do what every run does: `models.load`, then `models.spread`. Meanwhile
this process adds up the ranks' proportional set sizes (`/proc/PID/smaps_rollup`), in which a page that
several processes share counts once. Counted against the model's size is anonymous and shared memory
above what the ranks had before loading (Python and its libraries). Pages of the model's files, which the
system takes back when it needs room, stand apart. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.core_model_loading import revert_weight_conversion

from rlcs.plan.skeleton import published, skeleton
from tools import tiny_model

FILE_BYTES = 4_000_000_000
"""Of one file, as published."""
LIMIT_S = 1800
EVERY_S = 0.02


def main() -> None:
    """Write, load, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=1.0, help="share of every layer's width; 1: 7.5 GB")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="what the weights become: its size counts")
    parser.add_argument("--folder", type=Path, help="where the model is written, or lies from the last time")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what the ranks are started with
    options = parser.parse_args()
    if options.load:
        load(options.load, options.folder, options.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        size = write(folder, options.width) * getattr(torch, options.dtype).itemsize // 2
        report(size, measure(folder, options.ranks, options.dtype))


def report(size: int, peaks: Mapping[str, int]) -> None:
    """Print what was measured, in bytes and as a share of the model's size."""
    for name, peak in {"the model": size, **peaks}.items():
        print(f"{name:<40} {peak:>15,} bytes  {peak / size:6.3f} of its size")


def shape(width: float) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B with as many layers, all of them narrower."""
    config = published("Qwen/Qwen2.5-VL-3B-Instruct")
    assert config is not None, "a published name"
    text, vision = config.text_config, config.vision_config
    text.num_attention_heads = max(2, int(text.num_attention_heads * width))
    text.hidden_size = vision.out_hidden_size = 128 * text.num_attention_heads
    text.intermediate_size = int(text.intermediate_size * width)
    text.vocab_size = int(text.vocab_size * width)
    vision.num_heads = max(1, int(vision.num_heads * width))
    vision.hidden_size = 80 * vision.num_heads
    vision.intermediate_size = int(vision.intermediate_size * width)
    return config


def write(folder: Path, width: float) -> int:
    """A random model in the published layout, unless one is there already; returns its bytes in bfloat16."""
    config = shape(width)
    model = skeleton(config)
    names: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    names.pop("lm_head.weight")  # tied
    size = sum(2 * tensor.numel() for tensor in names.values())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return size
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tiny_model.build_processor(tiny_model.corpus(50)).save_pretrained(folder)
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in names.items():
        if sum(2 * t.numel() for t in files[-1].values()) + 2 * tensor.numel() > min(
            FILE_BYTES, size // 2 + 1
        ):
            files.append({})
        files[-1][name] = tensor
    places: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: _filled(t, pattern) for name, t in tensors.items()}, path, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}), encoding="utf-8")
    return size


def _filled(like: Tensor, pattern: Tensor) -> Tensor:
    times = -(-like.numel() // len(pattern))
    return pattern.repeat(times)[: like.numel()].clone().reshape(like.shape)


def measure(folder: Path, ranks: int, dtype: str = "bfloat16") -> dict[str, int]:
    """The largest sums over all ranks while they load the model in `folder`, in bytes."""
    with tempfile.TemporaryDirectory() as meeting:
        start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        own = ["-m", "bench.loading", "--load", meeting, "--folder", str(folder), "--dtype", dtype]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        process = subprocess.Popen([*start, "--nproc-per-node", str(ranks), *own], env=environment)
        try:
            return _watch(process, Path(meeting), ranks)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _watch(process: "subprocess.Popen[bytes]", meeting: Path, ranks: int) -> dict[str, int]:
    began = time.monotonic()

    def go_on() -> None:
        if process.poll() not in (None, 0) or time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"the ranks did not load the model: exit code {process.poll()}")
        time.sleep(EVERY_S)

    while len(found := list(meeting.glob("ready-*"))) < ranks:
        go_on()
    pids = [int(path.name.partition("-")[2]) for path in found]
    before = memory(pids)
    peak, whole = dict(before), sum(before.values())
    (meeting / "go").touch()
    loaded = False
    while not loaded:
        go_on()
        loaded = len(list(meeting.glob("loaded-*"))) == ranks
        after = memory(pids)
        peak = {kind: max(after[kind], most) for kind, most in peak.items()}
        whole = max(whole, sum(after.values()))
    (meeting / "end").touch()
    process.wait(timeout=60)
    return {
        "memory before loading": before["own"],
        "memory at most, above that": peak["own"] - before["own"],
        "memory after loading, above that": after["own"] - before["own"],
        "memory at most, with Python": peak["own"],
        "pages of files at most": peak["file"],
        "everything at most": whole,
    }


def memory(pids: Sequence[int]) -> dict[str, int]:
    """Proportional set size of all processes: their `own` memory, and pages of `file`s."""
    sums = {"own": 0, "file": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
        except (ProcessLookupError, FileNotFoundError):
            continue
        kinds = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        sums["own"] += kinds["Pss_Anon"] + kinds["Pss_Shmem"]
        sums["file"] += kinds["Pss_File"]
    return sums


def load(meeting: Path, folder: Path, dtype: str) -> None:
    """One rank: load, and wait until it has been looked at."""
    from rlcs.distributed import join_world
    from rlcs.model import loading
    from rlcs.recipe.execution import Parallel
    from rlcs.recipe.schema import Model

    with join_world(timeout_s=LIMIT_S) as world:
        loading.load(Model(name="builtin"), world=world)  # so that libraries are there
        (meeting / f"ready-{os.getpid()}").touch()
        _wait(meeting / "go")
        settings = Model.model_validate({"name": str(folder), "dtype": dtype})
        vlm = loading.spread(loading.load(settings, world=world), Parallel())
        assert vlm.fsdp_root is not None
        (meeting / f"loaded-{os.getpid()}").touch()
        _wait(meeting / "end")


def _wait(path: Path) -> None:
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"{path} does not come")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
