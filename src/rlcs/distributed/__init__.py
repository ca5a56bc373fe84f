"""Connects the processes of one run: ranks, devices, exchange of values, and stopping together.

`torchrun` starts the same command once for every rank. Without it a run has one rank, `World()`: the same
code without any waiting. Numbers, records and tensors in main memory go over gloo, tensors on GPUs over
nccl. Every wait has a limit; when a rank dies, the others end too, with a message.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rlcs.cores import MEETING, OWN, STARTED
from rlcs.distributed.peers import Meeting, Peers
from rlcs.errors import RlcsError, TrainingError, UserError
from rlcs.recipe.execution import ranks_per_copy
from rlcs.signals import StopFlag

T = TypeVar("T")

LONGEST_RANK_0_WORK = timedelta(days=30)
"""Limit on waiting while rank 0 works alone (a cold start may take days); its death is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The rank and device of this process, how many ranks there are (`local_size` here), and process groups.

    `objects` waits for a limited time, `patient` almost without limit; without `torchrun` both are None.

    `shards` neighbouring ranks share one copy of a model; ranks beyond the first `shards` hold copies of what
    those have. None: all ranks share one.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device | None = None
    shards: int | None = None
    objects: Any = None
    patient: Any = None

    @property
    def grouped(self) -> bool:
        """Whether `torchrun` started this run, if only with one process."""
        return self.objects is not None

    @property
    def writers(self) -> int:
        """The number of ranks, the first ones, that together hold every row of a sharded model once."""
        return self.shards or self.size

    @property
    def has_copies(self) -> bool:
        """Whether each rank has the whole model, on a CPU."""
        return self.size > 1 and self.shards == 1 and self.device == torch.device("cpu")

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if not self.grouped:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each name's sum over the ranks that have it; a name that ends in `_max`, its largest value."""
        totals: dict[str, float] = {}
        for of_rank in self.gather(dict(values)):
            for name, value in of_rank.items():
                if name not in totals:
                    totals[name] = value
                elif name.endswith("_max"):
                    totals[name] = max(totals[name], value)
                else:
                    totals[name] += value
        return totals

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.gather(flag))

    def first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 alone, however long it takes; all ranks get its result or raise its error."""
        if not self.grouped:
            return work()
        # Before any rank waits without a limit all must arrive here: rank 0 could not send its result to a
        # rank that hangs.
        dist.barrier(group=self.objects)
        outcome: list[Any] = [None, None]  # the result, or the error
        if self.rank == 0:
            try:
                outcome[0] = work()
            except RlcsError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.patient)
        if outcome[1] is not None:
            outcome[1].reported = self.rank != 0
            raise outcome[1]
        result: T = outcome[0]
        return result

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every rank, however long it takes; all get all results, or raise one's error."""
        if not self.grouped:
            return [work()]
        dist.barrier(group=self.objects)  # as in `first`
        outcome: tuple[T | None, RlcsError | None]
        try:
            outcome = (work(), None)
        except RlcsError as error:
            outcome = (None, error)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.patient)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                failure.reported = rank != self.rank
                raise failure
        return [result for result, _ in outcomes]

    def agree(self, stop: StopFlag) -> bool:
        """Whether the flag is set on any rank; if so, set it on all."""
        requested = self.any(stop.is_set)
        if requested:  # a signal that arrives during the exchange counts at the next one
            stop.is_set = True
        return requested

    def check(self, stop: StopFlag, where: str) -> None:
        """Raise Stopped on every rank if the flag is set on any; all must call this at the same point."""
        if not self.agree(stop):
            return
        try:
            stop.check(where)
        except RlcsError as error:
            error.reported = self.rank != 0
            raise


ALONE = World()
"""The world of a run without `torchrun`."""


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Move `whole` to the device of `like`; if `like` is sharded, this rank's rows alone."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    rows = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return rows.to(like.device)  # the world's device, unless shards are offloaded


def shard_of(tensor: DTensor) -> tuple[int, int]:
    """Which part of a sharded tensor's rows this rank holds, counted from 0, and the number of parts."""
    [dim] = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)


@contextmanager
def join_world(*, timeout_s: float, shard_size: int | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` describes in the environment; without it yield `ALONE`.

    `shard_size` ranks share one copy of a model, or all ranks where there are no more; None: all ranks share
    one, but that processes of `rlcs` itself have one each on CPUs.

    Raises UserError when there are more processes than GPUs or `shard_size` does not divide their number, and
    TrainingError when another rank ended or kept this one waiting for longer than `timeout_s`.
    """
    if STARTED not in os.environ:
        yield ALONE
        return
    limit = timedelta(seconds=timeout_s)
    is_own = os.environ[STARTED] == OWN
    device = _device(
        int(os.environ["LOCAL_RANK"]), "parallel.processes" if is_own else "torchrun --nproc-per-node"
    )
    rank = int(os.environ["RANK"])
    if shard_size is None and device.type == "cpu" and is_own:
        shard_size = 1
    shards = ranks_per_copy(int(os.environ["WORLD_SIZE"]), shard_size)
    try:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=limit, **(_own_meeting() if is_own else {}))
        objects = dist.new_group(backend="gloo", timeout=limit)
        patient = dist.new_group(backend="gloo", timeout=LONGEST_RANK_0_WORK)
        with _watched(rank, objects):
            yield World(
                rank=rank,
                size=dist.get_world_size(),
                local_size=_local_size(),
                device=device,
                shards=shards,
                objects=objects,
                patient=patient,
            )
            dist.destroy_process_group()
    except RuntimeError as error:
        if not _is_collective_failure(error):
            raise
        raise TrainingError(
            f"rank {rank} lost the others: one of them ended, or did not answer within {timeout_s:g} s",
            fix="its own message says why; the same command continues from the last checkpoint",
        ) from error


def _own_meeting() -> dict[str, Any]:
    """How ranks that `rlcs` has started find each other.

    By a file, since a port that was free when they were started may not be when they meet.
    """
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    return {"init_method": f"file://{os.environ[MEETING]}", "world_size": size, "rank": rank}


def _local_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def _watched(rank: int, objects: Any) -> Iterator[None]:
    """While in this context, end this process if another rank ends: see `distributed.peers`."""
    peers = Peers(rank)
    one_machine = _local_size() == dist.get_world_size()
    meeting: list[Meeting | None] = [None]
    if rank == 0:
        meeting[0] = peers.watch("127.0.0.1" if one_machine else "", secrets.token_hex(16))
    dist.broadcast_object_list(meeting, src=0, group=objects)
    if rank and meeting[0] is not None:
        peers.join(replace(meeting[0], host=meeting[0].host or os.environ["MASTER_ADDR"]))
    failed = True
    try:
        yield
        failed = False
    finally:
        peers.leave(failed=failed)


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as in CUDA_VISIBLE_DEVICES."""
    named = [gpu.strip() for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    return named or [str(index) for index in range(torch.cuda.device_count())]


def _device(local_rank: int, where: str) -> torch.device:
    """The device of a rank. Raises UserError on all ranks of a machine with fewer GPUs; the first says so."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks = max(_local_size(), local_rank + 1)
    if ranks > torch.cuda.device_count():
        what = f"{ranks} processes, but {torch.cuda.device_count()} GPUs"
        error = UserError(what, where=where, fix="start one process for each GPU")
        error.reported = local_rank > 0
        raise error
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _is_collective_failure(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo raises plain RuntimeErrors that name it or the connection."""
    words = ("gloo", "Connection closed by peer", "Timed out waiting", "Connection reset")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
