"""What travels between us and vLLM, either way: token ids and images out, ids and logprobs back.

A prompt goes as token ids with one placeholder an image, which vLLM expands to as many as its own image
processor makes patches for. The expanded ids come back and are compared with ours, so that a processor with
other pixel bounds is an error and not a slightly different model. Text never goes: what looks like a
placeholder in a question is plain text here and there.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlcs.engines.stop_reasons import stop_reason
from rlcs.errors import EndpointError
from rlcs.records import ImageRef, Prompt, Rollout, Sampling, StopReason, rollout_seed
from rlcs.storage import open_image

BAN = -100.0
"""The lowest bias that vLLM takes: no id with it is ever drawn."""


def collapsed(prompt: Prompt) -> list[int]:
    """The prompt's ids with one placeholder for each image."""
    ids: list[int] = []
    at = 0
    for start, end in prompt.spans:
        ids += [*prompt.ids[at:start], prompt.image_token_id]
        at = end
    return [*ids, *prompt.ids[at:]]


def first_seed(sampling: Sampling, step: int, prompt: Prompt) -> int:
    """The seed of a prompt's first answer; vLLM gives the i-th this plus i."""
    return rollout_seed(sampling.seed, step, prompt.problem_id, prompt.repeat * sampling.n) >> 1


def sampling_fields(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Our sampling in the words of vLLM's SamplingParams.

    End tokens of the model's configuration are switched off: ours alone end an answer, as they do in the
    local engine.
    """
    return {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,
        "logit_bias": {str(index): BAN for index in sampling.banned_ids},
        "logprobs": 0,  # those of the chosen ids alone
        "detokenize": False,
    }


def image_url(ref: ImageRef, *, limit: int) -> str:
    """An image as we decode it, without loss, so that orientation and transparency are settled here."""
    buffer = io.BytesIO()
    open_image(ref, limit=limit).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def request_body(prompt: Prompt, sampling: Sampling, *, step: int, limit: int) -> dict[str, Any]:
    """The body of `POST /inference/v1/generate`. `limit` is in pixels. Raises ImageError."""
    return {
        "token_ids": collapsed(prompt),
        "content_parts": [{"type": "image_url", "url": image_url(ref, limit=limit)} for ref in prompt.images],
        "sampling_params": sampling_fields(sampling, first_seed(sampling, step, prompt)),
        "return_token_ids": True,
    }


def rollouts_of(
    reply: Mapping[str, Any],
    prompt: Prompt,
    sampling: Sampling,
    *,
    step: int,
    text: Callable[[Sequence[int]], str],
) -> tuple[Rollout, ...] | None:
    """The answers in a reply, or None if one of them was broken off and the prompt must be asked again.

    Raises EndpointError when vLLM saw another prompt than ours.
    """
    _require_same_prompt(reply["prompt_token_ids"], prompt)
    choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
    stops = [stop_reason(choice["finish_reason"]) for choice in choices]
    if len(choices) != sampling.n or StopReason.ERROR in stops:
        return None
    seed = first_seed(sampling, step, prompt)
    return tuple(
        Rollout(
            problem_id=prompt.problem_id,
            index=index,
            ids=tuple(choice["token_ids"]),
            logprobs=tuple(min(0.0, token["logprob"]) for token in choice["logprobs"]["content"]),
            stop=stops[index],
            seed=seed + index,
            text=text(choice["token_ids"]),
        )
        for index, choice in enumerate(choices)
    )


def weights_seen(reply: Mapping[str, Any]) -> set[str]:
    """The versions of the weights that wrote the answers."""
    return {span["version"] for choice in reply["choices"] for span in choice["weight_versions"] or ()}


def _require_same_prompt(theirs: Sequence[int], prompt: Prompt) -> None:
    if tuple(theirs) == prompt.ids:
        return
    pairs = zip(theirs, prompt.ids, strict=False)
    at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(prompt.ids)))
    raise EndpointError(
        f"vLLM read the prompt of {prompt.problem_id} as {len(theirs)} tokens, we as {len(prompt.ids)}; "
        f"they differ from token {at} on",
        where="rollout.engine",
        fix="its image processor must have this run's pixel bounds: serve a folder that rlcs saved",
    )
