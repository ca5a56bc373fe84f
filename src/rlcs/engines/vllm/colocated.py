"""vLLM in this process's environment and on its GPUs: awake while it samples, asleep while we train."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rlcs.engines.vllm.fleet import Body, Take
from rlcs.engines.vllm.server import OLDEST, Launch, adapter_room
from rlcs.engines.vllm.weights import Weights
from rlcs.errors import ModelError, TrainingError

AT_ONCE = 512
"""Prompts handed to vLLM together; it schedules within."""


class Colocated:
    """One `vllm.LLM`; it takes and gives what a server would."""

    def __init__(self, launch: Launch, *, sleeps: bool) -> None:
        """VLLM is imported and started with the first weights; `sleeps`: it gives its memory to a trainer."""
        self._launch = launch
        self._sleeps = sleeps and not launch.on_cpu  # where vLLM has no such mode
        self._llm: Any = None
        self._has = ""
        self._asleep = False

    def ask(self, bodies: Sequence[Body], weights: Weights, take: Take) -> None:
        """See `vllm.Backend`. Raises ModelError without vLLM, TrainingError if a prompt fails too often."""
        llm = self._ready(weights)
        left = list(range(len(bodies)))
        for _ in range(self._launch.settings.max_tries):
            failed = []
            for start in range(0, len(left), AT_ONCE):
                places = left[start : start + AT_ONCE]
                asked = [bodies[place]() for place in places]
                outputs = llm.generate(
                    [_prompt(body) for body in asked],
                    [_params(body) for body in asked],
                    use_tqdm=False,
                    lora_request=_adapter(weights),
                )
                replies = [_reply(output) for output in outputs]
                failed += [p for p, reply in zip(places, replies, strict=True) if not take(p, reply)]
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
            self._has = weights.model.version
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        if self._has != weights.model.version:
            folder = {"weights_path": str(weights.model.folder)}
            self._llm.collective_rpc("reload_weights", kwargs=folder)
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.engine_core.reset_encoder_cache()
            self._has = weights.model.version
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
    share, rank = launch.settings.memory_share, launch.adapter_rank
    return vllm.LLM(
        model=str(weights.folder),
        dtype=launch.dtype,
        max_model_len=launch.max_tokens,
        max_num_seqs=launch.max_rows,
        tensor_parallel_size=launch.settings.tensor_parallel,
        limit_mm_per_prompt={"video": 0},
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        enable_sleep_mode=sleeps,
        **({} if share is None else {"gpu_memory_utilization": share}),
        **({"enable_lora": True, "max_lora_rank": adapter_room(rank)} if rank else {}),
        **({"enforce_eager": True, "enable_chunked_prefill": False} if launch.on_cpu else {}),
    )


def _adapter(weights: Weights) -> Any:
    """How vLLM is told of adapters; it reads them when it first meets their name and number."""
    if weights.base is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(weights.version, int(weights.version.rpartition("+")[2]), str(weights.folder))


def _prompt(body: Mapping[str, Any]) -> dict[str, Any]:
    images = [_image(part["url"]) for part in body["content_parts"]]
    prompt: dict[str, Any] = {"prompt_token_ids": body["token_ids"]}
    return {**prompt, "multi_modal_data": {"image": images}} if images else prompt


def _image(url: str) -> Any:
    from PIL.PngImagePlugin import PngImageFile

    return PngImageFile(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def _params(body: Mapping[str, Any]) -> Any:
    import vllm

    fields = dict(body["sampling_params"])
    fields["logit_bias"] = {int(index): bias for index, bias in fields["logit_bias"].items()}
    return vllm.SamplingParams(**fields)


def _reply(output: Any) -> dict[str, Any]:
    """An output of `LLM.generate` in the words of the server."""
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "choices": [
            {
                "index": choice.index,
                "finish_reason": choice.finish_reason,
                "token_ids": list(choice.token_ids),
                "logprobs": {
                    "content": [
                        {"logprob": found[token].logprob}
                        for token, found in zip(choice.token_ids, choice.logprobs, strict=True)
                    ]
                },
            }
            for choice in output.outputs
        ],
    }
