"""Asks a vLLM server for the logprobs of given answers to given prompts, with their images.

Used is the endpoint of rollouts (`/inference/v1/generate`): ids with images in, and as logprobs of the prompt
those of every token of prompt and answer, at temperature 1. The expanded ids come back and are compared: a
server that sees other tokens, because its images have another size or its tokenizer differs, is an error.
An answer is a request: vLLM computes the logprobs of a prompt anew each time, its cached prefix included.
"""

import time
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import torch
from torch import Tensor

from rlcs.data.images import data_uri, encode
from rlcs.distributed import ALONE, World
from rlcs.engines import connection
from rlcs.engines.openai_client import CONNECT_S, pause, status_error
from rlcs.engines.replies import FinalError, RetryableError, parsed, short
from rlcs.engines.vllm.protocol import one_placeholder_each
from rlcs.engines.vllm.server import GENERATE
from rlcs.errors import EndpointError
from rlcs.model.chat import Chat
from rlcs.model.packing import Pack
from rlcs.recipe.sampling import Endpoint
from rlcs.records import ImageRef

SERVE = "start it as `vllm serve MODEL --enable-scale-out`, vLLM 0.32 or newer"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Path:
    """A prompt with one answer: all ids, where images lie in them, and how many ids at the end are scored."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    images: tuple[ImageRef, ...]
    scored: int


class ScoringServer:
    """Scores packs by a model on a vLLM server; each rank sends its own."""

    def __init__(
        self, server: Endpoint, chat: Chat, *, marks_images: bool = False, world: World = ALONE
    ) -> None:
        """`chat` prepares the images; `marks_images`: see `PromptRequest`. Raises EndpointError."""
        self._server, self._chat, self._world = server, chat, world
        self._around = int(marks_images)
        self._place = connection.address(server.base_url)
        self._url = f"{self._place.url.removesuffix('/v1')}{GENERATE}"
        patience = server.request_timeout_s
        limits = openai.Timeout(patience, connect=min(patience, CONNECT_S))
        self._client = connection.connect_blocking(server, self._place, limits)

    def logprobs(self, packs: Sequence[Pack], *, temperature: float) -> list[Tensor]:
        """The logprobs (N,) of the branch tokens of each pack. Raises EndpointError on all ranks."""
        assert temperature == 1, "the recipe was checked"

        def score() -> list[Tensor]:
            paths = [_paths(pack) for pack in packs]
            flat = [path for of_pack in paths for path in of_pack]
            with ThreadPoolExecutor(self._server.concurrency) as threads:
                scores = iter(list(threads.map(self._score, flat)))
            return [torch.tensor([x for _ in of_pack for x in next(scores)]) for of_pack in paths]

        return self._world.each(score)[self._world.rank]

    def _score(self, path: _Path) -> list[float]:
        chat = self._chat
        token_ids = one_placeholder_each(path.ids, path.spans, chat.image_id, around=self._around)
        urls = [data_uri(encode(chat.resized(ref), compress_level=1)) for ref in path.images]
        body = {
            "model": self._server.model,
            "token_ids": token_ids,
            "content_parts": [{"type": "image_url", "url": url} for url in urls],
            "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
            "return_token_ids": True,
        }
        return self._read(self._post(body), path)

    def _read(self, reply: Any, path: _Path) -> list[float]:
        """The logprobs of the answer in a reply. Raises EndpointError."""
        found = reply if isinstance(reply, dict) else {}
        seen, entries = found.get("prompt_token_ids"), found.get("prompt_logprobs")
        if not isinstance(seen, list) or not isinstance(entries, list):
            raise EndpointError("the reply has no logprobs of the prompt", where=self._url, fix=SERVE)
        if tuple(seen) != path.ids or len(entries) != len(seen):
            raise EndpointError(
                f"the teacher's server read a prompt and its answer as {len(seen)} tokens, we as "
                f"{len(path.ids)}, or as other ones",
                where=self._place.url,
                fix="serve a model with the policy's tokenizer, whose image processor has this run's pixel "
                "bounds (images.min_pixels, images.max_pixels)",
            )
        start = len(path.ids) - path.scored
        try:
            return [float(entries[k][str(path.ids[k])]["logprob"]) for k in range(start, len(path.ids))]
        except (KeyError, TypeError, ValueError) as error:
            what = "the reply has no logprob of a token of the answer"
            raise EndpointError(what, where=self._url, fix=SERVE) from error

    def _post(self, body: dict[str, Any]) -> object:
        """Send a request until it is answered, within `max_retries`. Raises EndpointError."""
        attempts = 0
        while True:
            try:
                return parsed(self._client.post(self._url, body=body, cast_to=bytes))
            except RetryableError as error:
                failure: Exception = error
            except openai.APIStatusError as error:
                if error.status_code == 404:
                    what = f"HTTP 404: it scores no tokens there, or has no model {self._server.model!r}"
                    raise EndpointError(what, where=self._url, fix=SERVE) from error
                failure = status_error(error, self._server)
            except (openai.APIConnectionError, connection.UnreadableReply, ValueError) as error:
                cause = error.__cause__ or error
                what = short(f"{type(cause).__name__}: {cause}") + connection.proxy_note(self._place)
                failure = connection.untrusted(error, self._place) or RetryableError(what, kind="connection")
            attempts += 1
            if not isinstance(failure, RetryableError) or attempts > self._server.max_retries:
                raise self._final(failure, attempts) from failure
            time.sleep(pause(attempts, failure.after_s))

    def _final(self, failure: Exception, attempts: int) -> Exception:
        if isinstance(failure, EndpointError):
            return failure
        tried = f", in {attempts:,} attempts" if isinstance(failure, RetryableError) else ""
        refused = "see its log; its --max-model-len must hold a prompt with an answer"
        return EndpointError(
            f"the teacher does not score an answer: {failure}{tried}",
            where=self._url,
            fix=refused
            if isinstance(failure, FinalError)
            else "when it is up again, the same command goes on",
        )


def _paths(pack: Pack) -> list[_Path]:
    """The branches of a pack as separate sequences, each behind what it follows."""
    ids, segments = pack.ids.tolist(), pack.layout.segments
    images = list(zip(pack.layout.images, pack.images, strict=True))
    starts = [segment.start for segment in segments]
    targets, predictors = (pack.of_targets(x).tolist() for x in (pack.targets, pack.predictors))
    found, start = list[_Path](), 0
    for count in pack.sequence.bincount().tolist():
        own, place = targets[start : start + count], predictors[start]
        before: list[int] = []
        while True:
            segment = segments[bisect_right(starts, place) - 1]
            before = ids[segment.start : place + 1] + before
            if segment.parent is None:
                break
            place = segments[segment.parent].stop - 1
        inside = [
            ((first - segment.start, last - segment.start), ref)
            for (first, last), ref in images
            if segment.start <= first < segment.stop
        ]
        spans, refs = tuple(span for span, _ in inside), tuple(ref for _, ref in inside)
        found.append(_Path(ids=(*before, *own), spans=spans, images=refs, scored=count))
        start += count
    return found
