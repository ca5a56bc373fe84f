"""Computes how long training stands still for its checkpoints.

Each rank copies its part into main memory, for which training waits, and writes it to disk while training
goes on. Only where the next checkpoint is due before the last one is on the disk does training wait for that.
"""

from dataclasses import dataclass

from rlcs.plan.measured import Rates

TO_HOST = 10e9
"""Bytes a second from a GPU into pinned main memory: a guess, under half of what PCIe 4.0 x16 can do."""
DISK_WRITE = 0.5e9
"""Bytes a second that one process writes while all do, with checksums: a guess, for one NVMe disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stall:
    """The seconds of one checkpoint: of training between two, of the copy, of writing, of waiting for that.

    `guessed` are the rates that were not measured, by their names in `plan.measured.Rates`.
    """

    between_s: float
    copy_s: float
    write_s: float
    wait_s: float
    guessed: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the time between two checkpoints for which training stands still."""
        still = self.copy_s + self.wait_s
        return still / (self.between_s + still)


def stall(size: float, *, ranks: int, save_every: int, step_s: float, rates: Rates | None = None) -> Stall:
    """Compute the seconds of a checkpoint of `size` bytes, of which each of `ranks` writes its part.

    It is due every `save_every` steps of `step_s` seconds.
    """
    measured = {"to_host": rates and rates.to_host, "disk_write": rates and rates.disk_write}
    part, between = size / ranks, save_every * step_s
    write = part / (measured["disk_write"] or DISK_WRITE)
    return Stall(
        between_s=between,
        copy_s=part / (measured["to_host"] or TO_HOST),
        write_s=write,
        wait_s=max(0.0, write - between),
        guessed=tuple(name for name, rate in measured.items() if not rate),
    )
