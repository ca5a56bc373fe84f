"""Rollouts that arrive while all ranks do other work: received by a thread of rank 0, handed out in step."""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from rlcs.distributed import World
from rlcs.records import Rollout

OnArrival = Callable[[int, tuple[Rollout, ...]], None]
"""Called with the index of a prompt and its rollouts."""


class Arrivals:
    """The rollouts of prompts that are being sampled; each prompt's arrive once, in any order.

    The thread ends with the last of them, or when its engine is closed.
    """

    def __init__(self, sample: Callable[[OnArrival], None], count: int, world: World) -> None:
        """Let `sample` run on rank 0; it must report all `count` prompts before it returns."""
        self._world, self._sample = world, sample
        self.left = count
        """Prompts whose rollouts have not been taken."""
        self._queue: SimpleQueue[tuple[int, tuple[Rollout, ...]] | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rlcs-rollouts", daemon=True)
        if world.rank == 0:
            self._thread.start()

    def take(self, wait_s: float) -> list[tuple[int, tuple[Rollout, ...]]]:
        """What has arrived since the last call; if nothing, wait for the first for at most `wait_s`.

        All ranks must call this together and get the same. Raises the RlcsError that ended the sampling.
        """
        arrived = self._world.first(lambda: self._receive(wait_s))
        self.left -= len(arrived)
        return arrived

    def _run(self) -> None:
        try:
            self._sample(lambda index, rollouts: self._queue.put((index, rollouts)))
        except BaseException as error:  # `take` raises it in the thread that can handle it
            self._queue.put(error)

    def _receive(self, wait_s: float) -> list[tuple[int, tuple[Rollout, ...]]]:
        arrived: list[tuple[int, tuple[Rollout, ...]]] = []
        while len(arrived) < self.left:
            try:
                entry = self._queue.get(timeout=0 if arrived else wait_s)
            except Empty:
                return arrived
            if isinstance(entry, BaseException):
                raise entry
            arrived.append(entry)
        self._thread.join()  # the engine can be used again
        return arrived
