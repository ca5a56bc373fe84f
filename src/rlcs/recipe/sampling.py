"""The recipe's sections on sampling: model servers, the local engine, vLLM."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlcs.recipe.section import NonNegative, Positive, Section, Share

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of LoRA adapters that vLLM 0.32 can hold."""

Seconds = Annotated[float, Field(gt=0)]


class Server(Section):
    """How requests are sent to a model server."""

    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Local servers need none."""
    concurrency: Positive = 32
    """Requests at the same time."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds one attempt at one request may take in all."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Further attempts after a failure that may be temporary (busy, down, cut off, garbled, empty)."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Attempts started a minute, evenly spaced. None: as fast as the server answers."""
    prompt_price: NonNegative | None = None
    """Price of a million prompt tokens, in any currency."""
    completion_price: NonNegative | None = None
    """Price of a million completion tokens."""

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The cost of these tokens, in the currency of the prices; None without any price."""
        prices = (self.prompt_price, self.completion_price)
        if prices == (None, None):
            return None
        return (prompt_tokens * (prices[0] or 0.0) + completion_tokens * (prices[1] or 0.0)) / 1e6


class Endpoint(Server):
    """A server with the OpenAI chat protocol: vLLM, SGLang, a hosted API."""

    base_url: str
    """The address, with the version: `http://localhost:8000/v1`."""
    model: str
    """The model's name on that server."""


class EngineSettings(Section):
    """The engine that samples, and how vLLM is started."""

    engine: Literal["local", "vllm_server", "vllm_colocated"] = "local"
    """`local`: the model in this process; `vllm_server`: `vllm serve` processes; `vllm_colocated`: vLLM in
    this process's environment, which frees its GPU memory while the model trains."""
    servers: Positive = 1
    """`vllm serve` processes to start on this machine."""
    executable: str = "vllm"
    """The program to start; it may be of another Python environment."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`; they override those that rlcs sets."""
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each server, as in [`0,1`, `2,3`]. Empty: all see what this process sees."""
    tensor_parallel: Positive = 1
    """GPUs that share one copy of the model."""
    memory_share: Share | None = None
    """Share of a GPU's memory (without one, of main memory) for weights and cache. None: vLLM's default,
    which is nearly all; a colocated engine must leave space for training: try 0.4."""
    start_limit_s: Seconds = 900.0
    """Most seconds in which a server must start, or load new weights."""
    request_limit_s: Seconds = 1200.0
    """Most seconds for all answers to one prompt; a server that takes longer counts as hung."""
    health_limit_s: Seconds = 30.0
    """Most seconds for a server's answer to a health check; a server that takes longer counts as hung."""
    dead_limit_s: Seconds = 1800.0
    """The run stops after so many seconds without any healthy server; the last checkpoint is intact."""
    max_tries: Positive = 8
    """Attempts at one prompt before the run stops."""

    @model_validator(mode="after")
    def _one_device_list_a_server(self) -> "EngineSettings":
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(f"{len(self.devices)} devices for {self.servers} servers: give one entry each")
        return self

    @model_validator(mode="after")
    def _of_servers_alone(self) -> "EngineSettings":
        if self.arguments and self.engine == "vllm_colocated":
            raise ValueError(
                "vllm_colocated takes no arguments: leave them out, or set engine to vllm_server"
            )
        return self


class Rollouts(EngineSettings):
    """The engine that samples answers, in GRPO and in measurements."""

    urls: tuple[str, ...] = ()
    """Running servers, with the flags of docs/how-to/vllm-rollouts.md. Empty: start `servers`."""
    weights_folder: str | None = None
    """Folder in which new weights are written for the engine, in a subfolder that is removed when the run
    ends. None: the run's folder. Servers on other machines must see it under the same path."""
    lora: Literal["auto", "adapter", "merged"] = "auto"
    """How vLLM gets the weights of a policy that trains adapters. `adapter`: the model once, then only the
    adapters, which vLLM supports in the language model. `merged`: the whole model with the adapters merged,
    every step: far more to write, no extra work in sampling. `auto`: `adapter` where vLLM supports it."""
    concurrency: Positive = 64
    """Prompts at the same time, a server."""
    importance_cap: Annotated[float, Field(ge=1)] | None = 2.0
    """Each token's loss is weighted by policy / vLLM probability, at most this (truncated importance
    sampling, https://fengyao.notion.site/off-policy-rl). None: not corrected. With
    grpo.old_logprobs=sampler and several optimiser steps the loss's own ratio is that correction."""
    alarm: NonNegative = 0.1
    """Warn when the mean difference of vLLM's and the policy's logprobs is above this (nats)."""

    @model_validator(mode="after")
    def _started_by_others(self) -> "Rollouts":
        if self.urls and self.arguments:
            raise ValueError("the servers of `urls` run already: give `arguments` where they are started")
        return self

    @property
    def cap(self) -> float | None:
        """The bound of importance weights; None for the local engine, which needs none."""
        return None if self.engine == "local" else self.importance_cap
