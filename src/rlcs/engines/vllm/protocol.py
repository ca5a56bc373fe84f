"""Requests to vLLM and its replies: token ids and images out, ids and logprobs back.

A prompt is sent as token ids with one placeholder an image, which vLLM expands to as many as its image
processor makes patches for. The expanded ids come back and are compared with ours, so that a processor with
other pixel bounds is an error and not a slightly different model. Text is never sent: what looks like a
placeholder in a question stays plain text on both sides.
"""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlcs.data.images import data_uri, encode
from rlcs.engines.base import Seen
from rlcs.engines.stop_reasons import stop_reason
from rlcs.errors import EndpointError
from rlcs.records import ImageRef, Prompt, Rollout, Routes, Sampling, StopReason, rollout_seed

if TYPE_CHECKING:
    from PIL.Image import Image

ROUTES = {"enable_return_routed_experts": True, "enable_prefix_caching": True}
"""Arguments of a server whose answers say which experts computed them; vLLM 0.32 needs the second for it."""
ROUTES_FLAGS = ("--enable-return-routed-experts", "--enable-prefix-caching")
BAN = -100.0
"""The lowest bias that vLLM accepts: an id with it is never drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer as vLLM returns it."""

    index: int
    ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str
    routes: Routes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRequest:
    """Asks for `sampling.n` answers to one prompt; `resized` returns an image in the size that a model sees.

    vLLM's image processor leaves that size as it is, so that its patches are ours, bit by bit. With each
    token come the `num_likeliest` most likely ones. `marks_images`: vLLM puts the tokens before and after an
    image's own itself. `keeps_routes`: the answers say which experts computed them, and the first one which
    computed the prompt.
    """

    prompt: Prompt
    sampling: Sampling
    step: int
    resized: "Callable[[ImageRef], Image]"
    num_likeliest: int = 0
    keeps_routes: bool = False
    marks_images: bool = False

    @property
    def token_ids(self) -> list[int]:
        """The prompt's ids with one placeholder for each image."""
        prompt = self.prompt
        return one_placeholder_each(
            prompt.ids, prompt.spans, prompt.image_token_id, around=int(self.marks_images)
        )

    @property
    def seed(self) -> int:
        """The seed of the first answer; vLLM adds i for the i-th."""
        first = self.prompt.repeat * self.sampling.n
        return rollout_seed(self.sampling.seed, self.step, self.prompt.problem_id, first) >> 1

    @property
    def sampling_params(self) -> dict[str, Any]:
        """The fields of vLLM's SamplingParams.

        End tokens of the model's configuration are switched off: ours alone end an answer, as they do in the
        local engine.
        """
        sampling = self.sampling
        return {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": self.seed,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,
            "logit_bias": dict.fromkeys(sampling.banned_ids, BAN),
            "logprobs": self.num_likeliest,  # 0: those of the chosen ids alone
            "detokenize": False,
        }

    def body(self) -> dict[str, Any]:
        """The JSON body of `POST /inference/v1/generate`. Raises ImageError."""
        return {
            "token_ids": self.token_ids,
            "content_parts": [
                {"type": "image_url", "url": data_uri(encode(self.resized(ref), compress_level=1))}
                for ref in self.prompt.images
            ],
            "sampling_params": self.sampling_params,
            "return_token_ids": True,
        }

    def is_answered(self, finish_reasons: Sequence[object]) -> bool:
        """Whether all answers are there and none was aborted; otherwise the request must be sent again."""
        stops = [stop_reason(reason) for reason in finish_reasons]
        return len(stops) == self.sampling.n and StopReason.ERROR not in stops

    def rollouts(self, prompt_ids: Sequence[int], completions: Iterable[Completion]) -> tuple[Rollout, ...]:
        """The answers, still without text. Raises EndpointError when vLLM saw another prompt than ours."""
        _require_same_prompt(prompt_ids, self.prompt)
        return tuple(
            Rollout(
                problem_id=self.prompt.problem_id,
                index=completion.index,
                ids=tuple(completion.ids),
                logprobs=tuple(min(0.0, logprob) for logprob in completion.logprobs),
                stop=stop_reason(completion.finish_reason),
                seed=self.seed + completion.index,
                text="",
                routes=completion.routes,
            )
            for completion in sorted(completions, key=lambda completion: completion.index)
        )

    def rollouts_from(self, reply: Mapping[str, Any]) -> tuple[Rollout, ...]:
        """The answers in the JSON reply of a server. Raises EndpointError when it saw another prompt."""
        completions = (
            Completion(
                index=choice["index"],
                ids=choice["token_ids"],
                logprobs=[token["logprob"] for token in choice["logprobs"]["content"]],
                finish_reason=choice["finish_reason"],
                routes=self._routes(choice) if self.keeps_routes else None,
            )
            for choice in reply["choices"]
        )
        return self.rollouts(reply["prompt_token_ids"], completions)

    def _routes(self, choice: Mapping[str, Any]) -> Routes:
        """The experts that computed an answer, and for the first one the prompt; vLLM sends both with each.

        They come in the format of NumPy, (tokens but the last, layers, experts). Raises EndpointError.
        """
        fix = f"vllm serve needs {' '.join(ROUTES_FLAGS)}"
        if not choice.get("routed_experts"):
            raise EndpointError(
                "it does not say which experts it chose", where="rollout.router_replay", fix=fix
            )
        table = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)
        answer = len(choice["token_ids"]) - 1
        if table.ndim != 3 or len(table) != len(self.prompt.ids) + answer:
            tokens = f"{len(self.prompt.ids)} tokens of a prompt and {answer + 1} of an answer"
            what = f"it says which experts it chose in the form {table.shape}, for {tokens}"
            raise EndpointError(what, where="rollout.router_replay", fix="set it to false, and report this")
        routes = Routes(layers=table.shape[1], chosen=table.shape[2], data=table.astype("<u2").tobytes())
        return routes if choice["index"] == 0 else routes.last(answer)

    def seen_in(self, reply: Mapping[str, Any]) -> Seen:
        """What a server saw of the prompt, by its reply with one answer; nothing is compared."""
        [choice] = reply["choices"]
        candidates = []
        for token in choice["logprobs"]["content"]:
            others = {other["token_id"]: other["logprob"] for other in token["top_logprobs"]}
            candidates.append(tuple(({token["token_id"]: token["logprob"]} | others).items()))
        return Seen(
            prompt_ids=tuple(reply["prompt_token_ids"]),
            ids=tuple(choice["token_ids"]),
            candidates=tuple(candidates),
        )


OnAnswers = Callable[[int, tuple[Rollout, ...]], None]
"""Called with the index of a request and its answers."""


def one_placeholder_each(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], image_id: int, *, around: int
) -> list[int]:
    """The ids with one placeholder in place of each image's, and of the `around` tokens on either side."""
    shorter: list[int] = []
    text_start = 0
    for start, end in spans:
        shorter += [*ids[text_start : start - around], image_id]
        text_start = end + around
    return [*shorter, *ids[text_start:]]


def weight_versions(reply: Mapping[str, Any]) -> set[str]:
    """The versions of the weights that generated the answers in a server's reply."""
    return {span["version"] for choice in reply["choices"] for span in choice["weight_versions"] or ()}


def _require_same_prompt(expanded: Sequence[int], prompt: Prompt) -> None:
    if tuple(expanded) == prompt.ids:
        return
    pairs = zip(expanded, prompt.ids, strict=False)
    first = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(expanded), len(prompt.ids)))
    raise EndpointError(
        f"vLLM read the prompt of {prompt.problem_id} as {len(expanded)} tokens, we as {len(prompt.ids)}; "
        f"they differ from token {first} on",
        where="rollout.engine",
        fix="its image processor must have this run's pixel bounds: serve a folder that rlcs saved",
    )
