"""Sends each different conversation to a model once: in the background, within limits, replies kept on disk.

Judges and answer extractors are built on it. A reply is found again by the content of its conversation, so
that neither a resumed run nor a later step, problem or call asks a second time.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

from rlcs.generation.sample_log import SampleLog
from rlcs.generation.sampler import Sampler
from rlcs.records import Message, Request, Sample, SampleKey
from rlcs.signals import StopFlag

Conversation = tuple[Message, ...]
_POLL_S = 0.1  # between two checks of the stop flag
_LATE = "no reply in time"


class CachedSampler:
    """A sampler with a log of its replies; a context manager. To be used by one thread."""

    def __init__(
        self,
        sampler: Sampler,
        model: str,
        path: Path,
        *,
        threads: int = 1,
        max_requests: int | None = None,
        usable: Callable[[Sample], bool] = lambda sample: True,
    ) -> None:
        """Keep replies of `model`, the model behind `sampler`, in the log `path`.

        `threads` is how many calls of `start` are worked on at a time: 1 unless the sampler takes several.
        At most `max_requests` are sent, those of earlier runs with a reply in the log included. Replies of
        earlier runs that are not `usable` are asked for again: their cause may be gone.
        """
        self._sampler, self._model = sampler, model
        self._log = SampleLog(path, None)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cached-sampler")
        self._max_requests, self._requests, self._usable = max_requests, 0, usable
        self._lock = threading.Lock()
        self._waiting: list[Request] = []
        self._earlier: set[SampleKey] = set()  # replies of earlier runs that no call has used yet
        self._started: dict[str, str] = {}  # since the last call of `samples`: the reason without a reply
        self._calls: list[Future[None]] = []
        self._stop = StopFlag()

    def __enter__(self) -> Self:
        """Read the log of earlier runs. Raises RunFolderError, DataError."""
        self._log.__enter__()
        entries = self._log.entries
        self._requests = len(entries)
        for key in [key for key, entry in entries.items() if not self._usable(entry.sample)]:
            del entries[key]
        self._earlier = set(entries)
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what is under way and close the log."""
        self._stop.is_set = True
        self._threads.shutdown(cancel_futures=True)
        self._log.__exit__(*error)

    @property
    def exhausted(self) -> bool:
        """Whether `max_requests` were sent."""
        return self._max_requests is not None and self._requests >= self._max_requests

    def start(self, conversations: Iterable[Conversation]) -> None:
        """Ask in the background for replies that are neither in the log nor under way."""
        with self._lock:
            for request in map(self._request, conversations):
                if request.id in self._started or request.key in self._log.entries:
                    continue
                if self.exhausted:
                    self._started[request.id] = f"the limit of {self._max_requests:,} requests is reached"
                    continue
                self._requests += 1
                self._started[request.id] = _LATE
                self._waiting.append(request)
            if self._waiting:
                self._calls.append(self._threads.submit(self._work))

    def samples(
        self,
        conversations: Sequence[Conversation],
        *,
        limit_s: float = float("inf"),
        stop: StopFlag | None = None,
        usable: Callable[[Sample], bool] = lambda sample: True,
    ) -> list[Sample]:
        """The samples of conversations, in order, waiting for at most `limit_s`, or until `stop` is set.

        A sample without a reply in time has an error that is retryable: the next call asks again. Replies of
        earlier runs that are not `usable` for this call are asked for again, as in the constructor. Raises
        EndpointError when the server cannot be used at all.
        """
        for key in {self._request(conversation).key for conversation in conversations} & self._earlier:
            self._earlier.remove(key)
            if not usable(self._log.entries[key].sample):
                del self._log.entries[key]
        self.start(conversations)
        end = time.monotonic() + limit_s
        calls, self._calls = self._calls, []
        while wait(calls, timeout=_POLL_S).not_done:
            if time.monotonic() > end or (stop is not None and stop.is_set):
                self._stop.is_set = True
                wait(calls)
        self._stop = StopFlag()
        reasons, self._started, self._waiting = self._started, {}, []
        for call in calls:
            call.result()
        requests = list(map(self._request, conversations))
        return [
            entry.sample
            if (entry := self._log.entries.get(request.key))
            else request.sample(error=reasons[request.id], retryable=True)
            for request in requests
        ]

    def _work(self) -> None:
        """Ask what waits, in a thread of the pool; arrived replies are written at once."""
        with self._lock:
            requests, self._waiting = self._waiting, []
        for sample in self._sampler.samples(requests, stop=self._stop):
            with self._lock:
                self._log.add(sample)
                self._started[sample.id] = sample.error

    def _request(self, conversation: Conversation) -> Request:
        """The request whose id is the hash of model and conversation."""
        facts = json.dumps([self._model, [(m.role, *map(str, m.parts)) for m in conversation]])
        digest = hashlib.sha256(facts.encode("utf-8", "backslashreplace")).hexdigest()
        return Request(id=digest[:32], messages=conversation)
