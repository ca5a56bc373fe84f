"""vLLM in this process's environment and on its GPUs: awake while it samples, asleep while we train."""

import os
from collections.abc import Sequence
from typing import Any

from rlcs.engines.vllm.protocol import Completion, PromptRequest, Take
from rlcs.engines.vllm.server import LOGPROBS, OLDEST, Launch
from rlcs.engines.vllm.weights import Weights
from rlcs.errors import ModelError, TrainingError

AT_ONCE = 512
"""Prompts handed to vLLM together; it schedules within."""


class Colocated:
    """One `vllm.LLM`, which gets token ids and decoded images, and gives token ids and logprobs."""

    def __init__(self, launch: Launch, *, sleeps: bool) -> None:
        """VLLM is imported and started with the first weights; `sleeps`: it gives its memory to a trainer."""
        self._launch = launch
        self._sleeps = sleeps and not launch.on_cpu  # where vLLM has no such mode
        self._llm: Any = None
        self._version = ""
        self._asleep = False

    def generate(self, requests: Sequence[PromptRequest], weights: Weights, take: Take) -> None:
        """See `Backend.generate`. Raises ModelError without vLLM, too."""
        llm = self._ready(weights)
        left = list(range(len(requests)))
        for _ in range(self._launch.settings.max_tries):
            failed: list[int] = []
            for start in range(0, len(left), AT_ONCE):
                places = left[start : start + AT_ONCE]
                outputs = llm.generate(
                    [_prompt(requests[place]) for place in places],
                    [_params(requests[place]) for place in places],
                    use_tqdm=False,
                    lora_request=_adapter(weights),
                )
                for place, reply in zip(places, outputs, strict=True):
                    if requests[place].is_answered([output.finish_reason for output in reply.outputs]):
                        completions = map(_completion, reply.outputs)
                        take(place, requests[place].rollouts(reply.prompt_token_ids, completions))
                    else:
                        failed.append(place)
            left = failed
            if not left:
                return self._sleep()
        raise TrainingError(
            f"{len(left)} prompts got no answer in {self._launch.settings.max_tries} tries",
            where="rollout.engine=vllm_colocated",
            fix="see vLLM's log above; the same command continues from the last checkpoint",
        )

    def _ready(self, weights: Weights) -> Any:
        if self._llm is None:
            self._llm = _start(self._launch, weights.model, sleeps=self._sleeps)
            self._version = weights.model.version
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        if self._version != weights.model.version:
            folder = {"weights_path": str(weights.model.folder)}
            self._llm.collective_rpc("reload_weights", kwargs=folder)
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.engine_core.reset_encoder_cache()
            self._version = weights.model.version
        return self._llm

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """End vLLM's own processes."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _start(launch: Launch, weights: Weights, *, sleeps: bool) -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise ModelError(
            "vLLM is not installed beside rlcs",
            where="rollout.engine=vllm_colocated",
            fix=f"pip install 'vllm>={OLDEST[0]}.{OLDEST[1]}' here, or use rollout.engine=vllm_server with "
            "rollout.executable=/another/environment/bin/vllm",
        ) from error
    return vllm.LLM(model=str(weights.folder), enable_sleep_mode=sleeps, **LOGPROBS, **launch.arguments)


def _adapter(weights: Weights) -> Any:
    """The adapters as vLLM names them; it reads them when it first meets their name and number."""
    if weights.base is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(weights.version, int(weights.version.rpartition("+")[2]), str(weights.folder))


def _prompt(request: PromptRequest) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
    images = request.images()
    return {**prompt, "multi_modal_data": {"image": images}} if images else prompt


def _params(request: PromptRequest) -> Any:
    import vllm

    return vllm.SamplingParams(**request.sampling_params)


def _completion(output: Any) -> Completion:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return Completion(
        index=output.index,
        ids=output.token_ids,
        logprobs=[found[token].logprob for token, found in steps],
        finish_reason=output.finish_reason,
    )
