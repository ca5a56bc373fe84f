"""The GPUs that are checked: all of this machine, by one process; or one for each process of `torchrun`."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

from rlcs.doctor.gpu import Check

_ELASTIC = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_")


class Ranks(Protocol):
    """Which ranks' processes are started here, and how all learn what happened elsewhere."""

    @property
    def size(self) -> int:
        """The number of all ranks."""
        ...

    @property
    def own(self) -> range:
        """The ranks whose processes are started here."""
        ...

    def agree(self, key: str, value: str) -> str:
        """Rank 0's value, on all."""
        ...

    def collect(self, key: str, found: list[Check], *, wait_s: float) -> list[Check]:
        """The results of all ranks, where rank 0 is; elsewhere those found here."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnMachine:
    """All GPUs of this machine, with the processes of all started here."""

    size: int

    @property
    def own(self) -> range:
        """All ranks."""
        return range(self.size)

    def agree(self, key: str, value: str) -> str:
        """The value."""
        return value

    def collect(self, key: str, found: list[Check], *, wait_s: float) -> list[Check]:
        """What was found here."""
        return found


class TorchrunRank:
    """One process of `torchrun`, whose processes of checks meet those of the other ranks."""

    def __init__(self) -> None:
        """Connect to torchrun's store."""
        import torch

        dist: Any = torch.distributed  # its stores are not in its list of names
        self._rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.own = range(self._rank, self._rank + 1)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self._store = dist.PrefixStore("rlcs-doctor", store)

    def agree(self, key: str, value: str) -> str:
        """Rank 0's value; the others wait for it, for as long as a whole check may take."""
        if self._rank == 0:
            self._store.set(key, value)
            return value
        self._store.wait([key], timedelta(minutes=30))
        agreed: str = self._store.get(key).decode()
        return agreed

    def collect(self, key: str, found: list[Check], *, wait_s: float) -> list[Check]:
        """On rank 0 the results of all; a rank that gives none in time has failed."""
        self._store.set(f"{key}/{self._rank}", json.dumps([asdict(check) for check in found]))
        if self._rank:
            return found
        checks = list(found)
        for rank in range(1, self.size):
            try:
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=wait_s))
                checks += [Check(**row) for row in json.loads(self._store.get(f"{key}/{rank}"))]
            except RuntimeError:
                message, fix = f"rank {rank} gave no result", "see the messages of torchrun about it"
                checks.append(Check(ok=False, message=message, fix=fix))
        return checks


def all_ranks(gpus: int) -> Ranks:
    """The ranks of this start: one for each of `gpus`, or those of `torchrun`."""
    return TorchrunRank() if "TORCHELASTIC_RUN_ID" in os.environ else OwnMachine(size=gpus)


def free_port() -> str:
    """A port on this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def environment(rank: int, ranks: Ranks, *, port: str = "", alone: bool = False) -> dict[str, str]:
    """The environment of a rank's process: in a group of all with a `port`, or `alone` with its own GPU.

    With neither it sees all GPUs that this process sees.
    """
    given: Mapping[str, Any] = os.environ
    ours = {name: value for name, value in given.items() if not name.startswith(_ELASTIC)}
    local = int(given.get("LOCAL_RANK", rank)) if isinstance(ranks, TorchrunRank) else rank
    if not port:
        visible = [gpu for gpu in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        own = {"CUDA_VISIBLE_DEVICES": visible[local] if visible else str(local)} if alone else {}
        return {name: ours[name] for name in ours if name not in ("RANK", "WORLD_SIZE")} | own
    return ours | {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks.size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": given.get("LOCAL_WORLD_SIZE", str(ranks.size)),
        "MASTER_ADDR": given.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "rlcs-doctor",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 of this group hosts its store
    }
