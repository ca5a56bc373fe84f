"""The recipe's sections on what answers: a server by its protocol, our engine, or vLLM."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlcs.recipe.section import NonNegative, Positive, Section, Share

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of LoRA adapters that vLLM 0.32 can hold."""

Seconds = Annotated[float, Field(gt=0)]


class Server(Section):
    """How to talk to a model server, whichever it is."""

    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Local servers need none."""
    concurrency: Positive = 32
    """Requests under way at once."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds one attempt at one request may take in all."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Further attempts after a failure that may pass (busy, down, cut off, garbled, empty)."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Attempts started a minute, evenly spaced. None: as fast as the server answers."""
    prompt_price: NonNegative | None = None
    """Price of a million prompt tokens, in any currency."""
    completion_price: NonNegative | None = None
    """Price of a million completion tokens."""

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, in the currency of the prices; None without any price."""
        prices = (self.prompt_price, self.completion_price)
        if prices == (None, None):
            return None
        return (prompt_tokens * (prices[0] or 0.0) + completion_tokens * (prices[1] or 0.0)) / 1e6


class Endpoint(Server):
    """A server that speaks the OpenAI chat protocol: vLLM, SGLang, a hosted API."""

    base_url: str
    """Up to and with the version: `http://localhost:8000/v1`."""
    model: str
    """The model's name on that server."""


class EngineSettings(Section):
    """Which engine samples, and how vLLM is started."""

    engine: Literal["local", "vllm_server", "vllm_colocated"] = "local"
    """`local`: the model in this process; `vllm_server`: `vllm serve` processes; `vllm_colocated`: vLLM in
    this process's environment, asleep while the model trains."""
    servers: Positive = 1
    """`vllm serve` processes to start on this machine."""
    executable: str = "vllm"
    """The program to start; its environment may be another than ours."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`; they win over ours."""
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each server, as in [`0,1`, `2,3`]. Empty: all see what this process sees."""
    tensor_parallel: Positive = 1
    """GPUs that share one copy of the model."""
    memory_share: Share | None = None
    """Share of a GPU's memory (without one, of main memory) for weights and cache. None: vLLM's own, which is
    nearly all; a colocated engine must leave space for training, 0.4 say."""
    start_limit_s: Seconds = 900.0
    """Seconds in which a server must start, or load new weights."""
    request_limit_s: Seconds = 1200.0
    """Seconds for all answers to one prompt; a server that takes longer counts as hung."""
    health_limit_s: Seconds = 30.0
    """Seconds in which a server must say that it is well, else it counts as hung."""
    dead_limit_s: Seconds = 1800.0
    """With no server well for so many seconds the run stops; the last checkpoint is intact."""
    max_tries: Positive = 8
    """Tries of one prompt before the run stops."""

    @model_validator(mode="after")
    def _one_device_list_a_server(self) -> "EngineSettings":
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(f"{len(self.devices)} devices for {self.servers} servers: give one entry each")
        return self

    @model_validator(mode="after")
    def _of_servers_alone(self) -> "EngineSettings":
        if self.arguments and self.engine == "vllm_colocated":
            raise ValueError("arguments are of vllm_server: vllm_colocated takes none, leave them out")
        return self


class Rollouts(EngineSettings):
    """Who samples answers, in GRPO and in measurements."""

    urls: tuple[str, ...] = ()
    """Servers that run already, with the flags of docs/how-to/vllm-rollouts.md. Empty: start `servers`."""
    weights_folder: str | None = None
    """Where new weights are put for the engine to read, in a folder of this run's own that goes when it ends.
    None: in the run's folder. Servers on other machines need a folder that they see under the same path."""
    lora: Literal["auto", "adapter", "merged"] = "auto"
    """What vLLM gets of a policy that trains adapters. `adapter`: its model once, then the adapters alone;
    vLLM can do that for adapters in the language model. `merged`: the whole model with them folded in,
    every step: far more to write, no extra work in sampling. `auto`: `adapter` where vLLM can."""
    concurrency: Positive = 64
    """Prompts under way at once, a server."""
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
        """The bound of importance weights; None without vLLM, whose logprobs alone differ."""
        return None if self.engine == "local" else self.importance_cap
