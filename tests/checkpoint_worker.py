"""One rank of the tests of sharded checkpoints: `python checkpoint_worker.py JOBS.json`.

A job has a mesh, a folder and what to do there: `save`, `load` or `fail`; the ranks come from the
environment, as torchrun sets it. Each rank writes what it hashed and read to `JOBS-RANK.json`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rlcs import storage
from rlcs.distributed import World, join_world
from rlcs.errors import RunFolderError
from rlcs.train.checkpoint import Checkpoints
from rlcs.train.state import capture, restore

ROWS = (1, 3, 8, 50)
"""Rows of the weights: some are fewer than ranks, or no multiple of their number."""


def filled(rows: int) -> Tensor:
    return torch.arange(rows * 1000.0).reshape(rows, 1000) + rows


class Net(nn.Module):
    """Sharded weights, one of them tied, and a buffer that is not sharded."""

    def __init__(self, mesh: Any, fill: float | None = None) -> None:
        super().__init__()
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        for rows in ROWS:
            whole = filled(rows) if fill is None else torch.full((rows, 1000), fill)
            weight = nn.Parameter(distribute_tensor(whole, mesh, placements))
            self.register_parameter(f"w{rows}", weight)
        self.tied = self.w8
        self.register_buffer("seen", torch.full((5,), 7.0 if fill is None else fill))


def step(model: Net) -> torch.optim.AdamW:
    """An optimiser whose state differs from row to row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def everything(model: Net, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    state = capture(model, optimizer, step=0, cursor={})
    tensors = {**state.model, **state.optimizer.tensors}
    sharded = sorted(name for name, tensor in tensors.items() if isinstance(tensor, DTensor))
    return tensors | {name: tensors[name].full_tensor() for name in sharded}


@contextmanager
def count_reads(read: dict[str, Any]) -> Iterator[None]:
    """Record which files are hashed or opened, and the bytes of tensors that are read."""
    file_sum, safe_open = storage.file_sum, safetensors.safe_open

    def hashed(path: Path) -> storage.FileSum:
        read["hashed"][path.name] = path.stat().st_size
        return file_sum(path)

    class Slice:
        def __init__(self, rows: Any) -> None:
            self._rows = rows
            self.get_shape = rows.get_shape

        def __getitem__(self, rows: slice) -> Tensor:
            return counted(self._rows[rows])

    class Opened:
        def __init__(self, path: Path, framework: str) -> None:
            self._file = safe_open(path, framework=framework)
            self.name = path.name
            self.keys = self._file.keys
            read["opened"].append(path.name)

        def get_tensor(self, name: str) -> Tensor:
            return counted(self._file.get_tensor(name))

        def get_slice(self, name: str) -> Slice:
            return Slice(self._file.get_slice(name))

    def counted(tensor: Tensor) -> Tensor:
        read["bytes"] += tensor.nbytes
        return tensor

    storage.file_sum, safetensors.safe_open = hashed, Opened
    try:
        yield
    finally:
        storage.file_sum, safetensors.safe_open = file_sum, safe_open


def work(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Save, fail to save, or load; what this rank hashed and read meanwhile, and the bytes of its rows."""
    names = ("replicate", "shard")[2 - len(job["mesh"]) :]
    mesh = init_device_mesh("cpu", tuple(job["mesh"]), mesh_dim_names=names)
    checkpoints = Checkpoints(Path(job["folder"]), replace(world, shards=job["mesh"][-1]))
    model = Net(mesh)
    optimizer = step(model)
    read: dict[str, Any] = {"hashed": {}, "opened": [], "bytes": 0}
    with count_reads(read):
        if job["work"] == "save":
            checkpoints.start(capture(model, optimizer, step=1, cursor={}), keep=1)
            while checkpoints._unfinished:
                checkpoints.poll()
            checkpoints.wait()
        elif job["work"] == "fail":
            if world.rank == world.size - 1:
                storage.HashingWriter.write = fail  # type: ignore[method-assign]
            checkpoints.start(capture(model, optimizer, step=2, cursor={}), keep=1)
            try:
                checkpoints.wait()
            except RunFolderError as error:
                read["error"] = str(error)
        else:
            other = Net(mesh, fill=0.0)
            other_optimizer = step(other)
            state = checkpoints.load_latest()
            assert state is not None
            restore(state, other, other_optimizer)
            whole, found = everything(model, optimizer), everything(other, other_optimizer)
            assert whole.keys() == found.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    return read | {"own": 3 * sum(tensor.to_local().nbytes for tensor in model.parameters())}


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    with join_world(timeout_s=120) as world:
        found = [work(job, world) for job in json.loads(path.read_text())]
        path.with_name(f"{path.stem}-{world.rank}.json").write_text(json.dumps(found))


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main()
