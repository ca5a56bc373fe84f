"""The recipe's sections on sampling: model servers, the local engine, vLLM."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, JsonValue, model_validator

from rlcs.errors import RecipeError
from rlcs.recipe.section import Above0, NonNegative, Positive, Seconds, Section, Share, Whole

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of LoRA adapters that vLLM 0.32 can hold."""

COLOCATED_SHARE = 0.5
"""Share of a GPU's memory for a vLLM that takes turns with training, unless the recipe says another."""

FROM_ENVIRONMENT = "env:"
"""What a header's value begins with that stands in an environment variable."""
_OWN = {
    "model": "it is the key `model`",
    "messages": "they are made of the problems",
    "stream": "answers are read whole",
    "n": "every answer is a request of its own",
    "seed": "it follows from the run's seed",
    "temperature": "it is a key of its own",
    "top_p": "it is a key of its own",
    "max_tokens": "the limit is a key of its own",
    "max_completion_tokens": "the limit is a key of its own",
}
"""Fields of a request that `request.extra` cannot set, and why."""
_SECRET = re.compile(r"auth|key|token|secret|cookie|password|passwd|signature", re.IGNORECASE)


def _require_no_secret(address: str, where: str) -> None:
    """Raise RecipeError for an address with a user, a password or a key: recipes lie in run folders."""
    fix = "put it into an environment variable NAME, and send it as a header: "
    try:
        parts = urlsplit(address)
        query = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError:  # reported when the address is used
        return
    if "@" in parts.netloc:
        fix += "request.headers={Authorization: env:NAME}, where NAME holds `Basic` and the encoded pair"
        raise RecipeError("the address holds a user or a password", where=where, fix=fix)
    if secret := next(filter(_SECRET.search, query), None):
        fix += "request.headers={X-API-Key: env:NAME}, with the header's name that the server expects"
        raise RecipeError(f"the address holds a secret ({secret})", where=where, fix=fix)


class RequestFields(Section):
    """What is sent with each request to a server, for servers that refuse or need certain fields."""

    max_tokens: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    """Name of the field with the limit of tokens. `auto`: `max_tokens`, unless `quirks` know better."""
    omit: tuple[Literal["max_tokens", "temperature", "top_p", "seed", "n"], ...] = ()
    """Fields that are not sent: the server's own default counts. Of `max_tokens` too."""
    extra: Mapping[str, JsonValue] = Field(default_factory=dict)
    """Further fields of the request, as the server names them: `{reasoning_effort: low}`, `{top_k: 20}`."""
    headers: Mapping[str, str] = Field(default_factory=dict)
    """Further HTTP headers; `env:NAME` stands for the value of an environment variable, and secrets must."""
    quirks: Literal["auto", "none"] = "auto"
    """`auto`: fields are left out or renamed for servers known to refuse them, and for those that say so."""

    @model_validator(mode="after")
    def _leaves_ours_alone(self) -> "RequestFields":
        for name in self.extra:
            if name in _OWN:
                raise ValueError(f"extra cannot set {name}: {_OWN[name]}")
        for name, value in self.headers.items():
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                raise ValueError("a name in headers has characters that HTTP does not allow")
            if _SECRET.search(name) and not value.startswith(FROM_ENVIRONMENT):
                raise ValueError(
                    f"the value of the header {name} looks like a secret, and recipes are written into run "
                    f"folders: put it into an environment variable and write {name}: env:VARIABLE"
                )
        return self


class Server(Section):
    """How requests are sent to a model server."""

    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Local servers need none."""
    concurrency: Positive = 32
    """Requests at the same time."""
    request_timeout_s: Seconds = 600.0
    """Seconds one attempt at one request may take in all."""
    max_retries: Whole = 6
    """Further attempts after a failure that may be temporary (busy, down, cut off, garbled)."""
    requests_per_minute: Above0 | None = None
    """Attempts started a minute, evenly spaced. None: as fast as the server answers."""
    prompt_price: NonNegative | None = None
    """Price of a million prompt tokens, in any currency."""
    completion_price: NonNegative | None = None
    """Price of a million completion tokens."""
    request: RequestFields = RequestFields()
    """Fields and headers of its requests."""

    @model_validator(mode="after")
    def _address_holds_no_secret(self) -> "Server":
        """A RecipeError, as that of pydantic would show the value."""
        _require_no_secret(getattr(self, "base_url", None) or "", f"{type(self).__name__.lower()}.base_url")
        return self

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The cost of these tokens, in the currency of the prices; None without any price."""
        prices = (self.prompt_price, self.completion_price)
        if prices == (None, None):
            return None
        return (prompt_tokens * (prices[0] or 0.0) + completion_tokens * (prices[1] or 0.0)) / 1e6

    def at(self, base_url: str, model: str, *, section: str) -> "Endpoint":
        """The endpoint with these settings; `section` names them in messages."""
        shared = {name: getattr(self, name) for name in Server.model_fields}
        return Endpoint(base_url=base_url, model=model, section=section, **shared)


class Endpoint(Server):
    """A server with the OpenAI chat protocol: vLLM, SGLang, a hosted API."""

    base_url: str
    """The address, with the version: `http://localhost:8000/v1`."""
    model: str
    """The model's name on that server."""
    section: str = ""
    """Where these settings stand, in messages: a recipe's section like `teacher`, or an option."""

    def key(self, name: str) -> str:
        """How a setting of this endpoint is called in messages: `teacher.request.omit`, `--request omit`."""
        if self.section.startswith("--"):
            return f"{self.section} {name.removeprefix('request.')}"
        return f"{self.section}.{name}" if self.section else name


class EngineSettings(Section):
    """The engine that samples, and how vLLM is started."""

    engine: Literal["local", "vllm_server", "vllm_colocated"] = "local"
    """`local`: the model in this process; `vllm_server`: `vllm serve` processes on GPUs of their own;
    `vllm_colocated`: every rank (or every `tensor_parallel` ranks) starts a `vllm serve` on its own GPU,
    which sleeps and frees its memory while the model trains."""
    servers: Positive = 1
    """`vllm serve` processes to start on this machine, with `vllm_server`."""
    executable: str = "vllm"
    """The program to start; it may be of another Python environment."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`; they override those that rlcs sets."""
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each server, as in [`0,1`, `2,3`], with `vllm_server`. Empty: all see what this
    process sees."""
    tensor_parallel: Positive = 1
    """GPUs that share one copy of the model."""
    memory_share: Share | None = None
    """Share of a GPU's memory (without one, of main memory) for weights and cache. None: vLLM's default,
    which is nearly all; with `vllm_colocated` 0.5, as weights and optimiser stay while it samples."""
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
        if self.engine == "vllm_colocated" and (self.devices or self.servers > 1):
            raise ValueError(
                "vllm_colocated starts a server on every rank's own GPU: leave out `servers` and `devices`, "
                "or set engine to vllm_server"
            )
        return self

    @property
    def share(self) -> float | None:
        """The share of memory that vLLM is started with; None: its own default."""
        if self.memory_share is None and self.engine == "vllm_colocated":
            return COLOCATED_SHARE
        return self.memory_share


class Rollouts(EngineSettings):
    """The engine that samples answers, in GRPO and in measurements."""

    urls: tuple[str, ...] = ()
    """Running servers, with the flags of docs/how-to/vllm-rollouts.md. Empty: start `servers`."""
    weights_folder: str | None = None
    """Folder in which new weights are written for the engine, in a subfolder that is removed when the run
    ends. None: the run's folder. Servers on other machines must see it under the same path."""
    weights: Literal["auto", "transfer", "folder"] = "auto"
    """How new weights of a whole model reach vLLM. `transfer`: from GPU to GPU, by vLLM's weight transfer
    (IPC for `vllm_colocated`, NCCL of one version for servers). `folder`: written to main memory or the disk
    and read again. `auto`: `transfer` on GPUs for servers of ours, and `folder` for the rest of the run, with
    a warning, once that fails. The first weights of a run, and adapters, always go through a folder."""
    lora: Literal["auto", "adapter", "merged"] = "auto"
    """How vLLM gets the weights of a policy that trains adapters. `adapter`: the model once, then only the
    adapters, which vLLM supports in the language model. `merged`: the whole model with the adapters merged,
    every step: far more to write, no extra work in sampling. `auto`: `adapter` where vLLM supports it."""
    concurrency: Positive = 64
    """Prompts at the same time, a server."""
    quantization: Literal["fp8"] | None = None
    """`fp8`: vLLM rounds the language model's weights to 8 bits when it loads them, and activations as they
    come: half the memory, faster on GPUs from Ada and Hopper on, and answers of a slightly different policy,
    which `importance_cap` corrects and `alarm` watches. Weights are sent unrounded as ever."""
    importance_cap: Annotated[float, Field(ge=1, le=1_000_000)] | None = 2.0
    """Each token's loss is weighted by policy / vLLM probability, at most this (truncated importance
    sampling, https://fengyao.notion.site/off-policy-rl). None: not corrected. With
    grpo.old_logprobs=sampler and several optimiser steps the loss's own ratio is that correction."""
    router_replay: bool = False
    """Train each token of a mixture of experts by the experts that the engine chose for it, with weights by
    the policy's own router (arXiv 2510.11370): kernels that round otherwise choose others for some tokens.
    Every answer then carries their ids, a byte for each token, layer and expert, for its prompt too. Off, as
    vLLM must run as docs/how-to/vllm-rollouts.md says. The reference of a KL penalty chooses its own."""
    alarm: NonNegative = 0.1
    """Warn when the mean difference of vLLM's and the policy's logprobs is above this (nats)."""
    checks: Whole = 4
    """How often RL compares what the engine sees and computes with the trainer: before its first step, and
    after each of the first updates of weights. Prompts with images, the same with other images, and without
    go through both; a mismatch stops the run and names the layer that is wrong. 0: never."""

    @model_validator(mode="after")
    def _started_by_others(self) -> "Rollouts":
        for url in self.urls:
            _require_no_secret(url, "rollout.urls")
        if self.urls and self.engine == "vllm_colocated":
            raise ValueError("the servers of `urls` run elsewhere: set engine to vllm_server")
        for name in ("arguments", "quantization"):
            if self.urls and getattr(self, name):
                raise ValueError(f"the servers of `urls` run already: give `{name}` where they are started")
        return self

    @model_validator(mode="after")
    def _quantised_needs_correction(self) -> "Rollouts":
        if self.quantization and self.engine == "local":
            raise ValueError("quantization is vLLM's: set engine to vllm_server or vllm_colocated")
        if self.quantization and self.importance_cap is None:
            raise ValueError(
                "with quantization the answers are those of another policy than the one that learns: set "
                "importance_cap, such as 2, or leave quantization out"
            )
        return self

    @property
    def cap(self) -> float | None:
        """The bound of importance weights; None for the local engine, which needs none."""
        return None if self.engine == "local" else self.importance_cap
