"""Runs vLLM beside the trainer, on the same GPUs; between rounds of sampling vLLM frees their memory."""

import os
from collections.abc import Sequence
from typing import Any

from rlcs.engines.vllm.protocol import Completion, OnAnswers, PromptRequest
from rlcs.engines.vllm.server import LOGPROBS, OLDEST, Launch, share_advice
from rlcs.engines.vllm.weights import Weights
from rlcs.errors import ModelError, OutOfMemory, TrainingError, shortage

AT_ONCE = 512
"""Prompts in one call of vLLM, which schedules them."""


class Colocated:
    """One `vllm.LLM`: token ids and decoded images in, token ids and logprobs out."""

    def __init__(self, launch: Launch, *, sleeps: bool) -> None:
        """VLLM is imported and started with the first weights; `sleeps`: between rounds it frees memory."""
        self._launch = launch
        self._sleeps = sleeps and not launch.on_cpu  # vLLM has no sleep mode on a CPU
        self._llm: Any = None
        self._version = ""
        self._asleep = False

    def generate(self, requests: Sequence[PromptRequest], weights: Weights, on_answers: OnAnswers) -> None:
        """See `Backend.generate`. Raises ModelError without vLLM, too."""
        llm = self._ready(weights)
        left = list(range(len(requests)))
        for _ in range(self._launch.settings.max_tries):
            failed: list[int] = []
            for start in range(0, len(left), AT_ONCE):
                indices = left[start : start + AT_ONCE]
                outputs = llm.generate(
                    [_prompt(requests[index]) for index in indices],
                    [_params(requests[index]) for index in indices],
                    use_tqdm=False,
                    lora_request=_adapter(weights),
                )
                for index, reply in zip(indices, outputs, strict=True):
                    if requests[index].is_answered([output.finish_reason for output in reply.outputs]):
                        completions = map(_completion, reply.outputs)
                        on_answers(index, requests[index].rollouts(reply.prompt_token_ids, completions))
                    else:
                        failed.append(index)
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
        """End vLLM's processes."""
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
    try:
        return vllm.LLM(model=str(weights.folder), enable_sleep_mode=sleeps, **LOGPROBS, **launch.arguments)
    except (RuntimeError, ValueError) as error:
        what, share = shortage(str(error)), launch.settings.memory_share
        if what:
            raise OutOfMemory(what, fix=share_advice(what, share)) from error
        raise ModelError(
            f"vLLM ended while starting: {str(error)[:500]}",
            where="rollout.engine=vllm_colocated",
            fix=f"its own message stands above; if memory ran out: {share_advice('', share)}",
        ) from error


def _adapter(weights: Weights) -> Any:
    """The adapters as vLLM's request; vLLM reads their files at the first request with their name and id."""
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
        logprobs=[by_token[token].logprob for token, by_token in steps],
        finish_reason=output.finish_reason,
    )
