"""Starts one vLLM server, sends it requests, loads new weights into it, and notices its failures.

Used are vLLM's token-in-token-out endpoint (`/inference/v1/generate`) and, from its development mode,
pausing, reloading weights from a folder, and naming their version, which every answer then carries. Adapters
are loaded under their version's name, which requests then carry.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from rlcs.distributed.torchrun import outside_torchrun
from rlcs.engines.base import Seen
from rlcs.engines.vllm.process import Process
from rlcs.engines.vllm.protocol import ROUTES, PromptRequest, weight_versions
from rlcs.engines.vllm.weights import Weights, model_of
from rlcs.errors import EndpointError, ModelError, OutOfMemory, shortage
from rlcs.patience import OwnTime, Patience, within
from rlcs.recipe.sampling import ADAPTER_RANKS, EngineSettings, Rollouts
from rlcs.records import Rollout
from rlcs.redaction import without_keys
from rlcs.storage import read_json

log = logging.getLogger("rlcs")

OLDEST = (0, 32)
"""The first vLLM with the interfaces used here: ids with images in, expanded ids and weight versions
out. Older ones also crashed from placeholders typed into a question (see docs/how-to/vllm-rollouts.md)."""
GENERATE = "/inference/v1/generate"
LOGPROBS = {"logprobs_mode": "processed_logprobs"}
"""Logprobs of the distribution that was sampled from, temperature and banned ids included."""
OWN_DEFAULTS = {"generation_config": "vllm"}
"""The sampling defaults in the model's folder are not used."""
NEEDED = {"enable_scale_out": True, **LOGPROBS, **OWN_DEFAULTS}
"""Arguments of every server of rollouts; the first opens the endpoint `GENERATE`."""
ON_CPU = {"enforce_eager": True, "enable_chunked_prefill": False}
"""On a CPU compiling costs more than it saves, and vLLM 0.32 crashes there on a seeded prompt prefilled in
parts (`CPU Generator does not use offset`)."""
RECURRENT_ON_CPU = {"enable_prefix_caching": False}
"""vLLM keeps states of recurrent layers for later prompts only where it prefills prompts in parts."""
RECURRENT_DTYPES = ("bfloat16",)
"""Number formats in which vLLM computes gated delta nets on a CPU."""
FP8 = {
    "quantization": "fp8_per_channel",
    "quantization_config": {
        "ignore": [
            r"re:.*(visual|vision_tower|multi_modal_projector|embed_vision)\..*",
            r"re:.*\.(in_proj_ba?|in_proj_a|mlp\.gate)$",
        ]
    },
}
"""Arguments for FP8: a scale for each output channel of a weight, and for each token of its input. Vision
towers are left out: they are a small part of the work, and their widths are no multiples of 16; so are the
gates of delta nets and the routers of experts, which decide what follows. vLLM 0.32 rounds again whenever it
reloads weights; its `--quantization fp8` takes only weights that are rounded already."""
SHARE = "rollout.memory_share"
ADAPTER_SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""Set in a server's environment, it opens the endpoints that load and unload adapters."""
_DISCARDED = "discarded"
_MEMORY = {"weights", "kv_cache"}
_POLL_S, _TICK_S = 0.5, 1.0


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Convert arguments to options of `vllm serve`."""
    words: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def adapter_arguments(rank: int) -> dict[str, Any]:
    """Arguments for adapters of this rank, with the lowest limit on ranks that vLLM offers and that fits."""
    return {"enable_lora": True, "max_lora_rank": next(limit for limit in ADAPTER_RANKS if limit >= rank)}


def context_length(sampler: EngineSettings, default: int) -> int | None:
    """Tokens of the longest prompt with its answer: as in a server's arguments, or else `default`.

    The arguments may count in thousands (`8k`) or 1024s (`8K`). None: vLLM measures what fits into memory.
    """
    words = " ".join(sampler.arguments) if sampler.engine == "vllm_server" else ""
    if not (found := re.findall(r"--max[-_]model[-_]len[= ](\S+)", words)):
        return default
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", found[-1])
    units = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}
    return int(float(number[1]) * units[number[2]]) if number else None


class DownError(Exception):
    """A failure of the server that may pass; `needs_restart`: only by a restart."""

    def __init__(self, why: str, *, needs_restart: bool = True) -> None:
        """`why` is the text for the log."""
        super().__init__(why)
        self.needs_restart = needs_restart


class LostWeightsError(Exception):
    """The server does not have the weights, and they lie in no folder."""


class RetryableError(Exception):
    """This one request failed; that may pass."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings to start vLLM with; the limits are those of the run.

    `number` is that of the first server that is started here, and `gpus` is the CUDA_VISIBLE_DEVICES of a
    server that takes turns with the rank that starts it. `sleep_level`: 0 never sleeps; 1 keeps the weights
    in main memory, for those that stay the same; 2 discards them, for those that come again with every step.
    `shares_gpu`: one of the servers starts or wakes up on the GPU of this rank's model.
    `transfer` is vLLM's way to receive weights beside the folder (`transfer.Channel`), if any.
    `is_recurrent`: some of the model's layers keep a state instead of keys and values.
    """

    settings: Rollouts
    dtype: str
    max_tokens: int
    max_rows: int
    on_cpu: bool = False
    adapter_rank: int = 0
    number: int = 0
    gpus: str = ""
    shares_gpu: bool = False
    sleep_level: int = 0
    transfer: str = ""
    is_recurrent: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `vllm serve`, beside those of the protocol."""
        share = self.settings.share
        return {
            **OWN_DEFAULTS,
            "dtype": self.dtype,
            "max_model_len": self.max_tokens,
            "max_num_seqs": self.max_rows,
            "tensor_parallel_size": self.settings.tensor_parallel,
            "limit_mm_per_prompt": {"video": 0, "audio": 0},
            **({} if share is None else {"gpu_memory_utilization": share}),
            **(adapter_arguments(self.adapter_rank) if self.adapter_rank else {}),
            **({"enable_sleep_mode": True} if self.sleep_level else {}),
            **({"weight_transfer_config": {"backend": self.transfer}} if self.transfer else {}),
            **(FP8 if self.settings.quantization else {}),
            **(ROUTES if self.settings.router_replay else {}),
            **(ON_CPU if self.on_cpu else {}),
            **(RECURRENT_ON_CPU if self.on_cpu and self.is_recurrent else {}),
        }

    def command(self, folder: Path, port: int) -> list[str]:
        """The command line of one server."""
        address = {"host": "127.0.0.1", "port": port}
        words = flags({**address, **NEEDED, **self.arguments})
        return [self.settings.executable, "serve", str(folder), *words, *self.settings.arguments]

    @property
    def fits_itself(self) -> bool:
        """Whether vLLM sets the context length by what fits into memory."""
        return context_length(self.settings, self.max_tokens) is None

    def environment(self, index: int) -> dict[str, str]:
        """The environment of the server with this number."""
        extra = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if self.adapter_rank:
            extra[ADAPTER_SWITCH] = "1"
        if self.transfer == "ipc":
            extra["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory are pickles
        if gpus := self.gpus or next(iter(self.settings.devices[index:]), ""):
            extra["CUDA_VISIBLE_DEVICES"] = gpus
        return {**outside_torchrun(without_keys(os.environ)), **extra}


def share_advice(what: str, share: float | None) -> str:
    """Whether vLLM needs a larger share of a GPU's memory than it has, or a smaller one."""
    now = f"{SHARE} (now {share or 'the default'})"
    if "No available memory" in what or "available KV cache" in what:
        return (
            f"raise {now}: weights and one pass alone fill that share; or shorten what must fit, "
            "prompt.max_tokens + grpo.max_new_tokens and eval.max_new_tokens"
        )
    return f"lower {now}, or end what else is in the GPU's memory (nvidia-smi shows it)"


class Server:
    """The server at `url`, or without a URL one that is started here."""

    def __init__(
        self, settings: Rollouts, index: int, *, logs: Path, url: str, launch: Launch, starter: Executor
    ) -> None:
        """Nothing is started yet. A server at `url` needs the context length in `launch` too.

        Processes are started in the thread of `starter`: with the end of its thread a process ends, too.
        """
        self._settings, self._index = settings, index
        self._url, self._ours, self._launch = url.rstrip("/"), not url, launch
        self._log = logs / f"vllm-{index}.log"
        self._starter = starter
        self._process: Process | None = None
        self._starting: Patience | None = None
        """How long the process may take to start; None: it has started."""
        self._own_time = OwnTime(None, min(_TICK_S, settings.health_limit_s / 10))
        self._is_checked = self._paused = False
        self._asleep: set[str] = set()
        self.channel = ""
        """The channel of weights to which it is connected."""
        self.precision = ""
        """The number format in which it computes, once it was compared with the run's settings."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"vLLM server {self._index} ({self._url or 'not started'})"

    async def up(self, client: httpx.AsyncClient, weights: Weights) -> None:
        """Start it if it has no URL and does not run; wait until it is well.

        Raises DownError; ModelError if waiting cannot help.
        """
        if self._ours and (self._process is None or not self._process.runs):
            await self._start(weights)
        if self._process is not None and self._starting is not None:  # begun now, or in an earlier round
            await self._until_started(client, self._process, self._starting)
            self._starting = None
        else:
            await self.require_well(client)

    async def load_weights(self, client: httpx.AsyncClient, weights: Weights) -> None:
        """Load these weights unless it has them, and wake it up.

        Raises DownError; EndpointError for unsuitable settings.
        """
        if not self._is_checked:
            await self._require_fit(client, weights)
            self._is_checked = True
        await self._wake(client, "weights")  # the cache later: it would take space while weights load
        has = (await self._call(client, "GET", "/weight_info")).json()["weight_version"]
        if has != weights.version and weights.sent:
            raise LostWeightsError
        if has != weights.version or self._paused:
            await self._load(client, weights, has)
        await self._wake(client, "kv_cache")

    async def _wake(self, client: httpx.AsyncClient, memory: str) -> None:
        if memory in self._asleep:
            await self._call(client, "POST", "/wake_up", params={"tags": memory})
            self._asleep.remove(memory)

    async def begin_update(
        self, client: httpx.AsyncClient, weights: Weights, channel: str, info: Mapping[str, Any]
    ) -> None:
        """Prepare it for weights that are sent, connected to the channel by `info`. Raises DownError."""
        await self.up(client, weights)
        if self._asleep:
            await self._wake(client, "weights")
        else:
            await self._call(client, "POST", "/pause", params={"mode": "abort"})
        self._paused = True
        if self.channel != channel:
            if self.channel:
                await self._call(client, "POST", "/shutdown_weight_transfer_engine")
            await self._call(client, "POST", "/init_weight_transfer_engine", json={"init_info": info})
            self.channel = channel
        await self._call(client, "POST", "/start_weight_update")

    async def update(self, client: httpx.AsyncClient, info: Mapping[str, Any]) -> None:
        """Let it receive some weights. Raises DownError."""
        await self._call(client, "POST", "/update_weights", json={"update_info": info})

    async def finish_update(self, client: httpx.AsyncClient, version: str) -> None:
        """Let it use the weights that it has received; if it sleeps, its cache goes on sleeping."""
        await self._call(client, "POST", "/finish_weight_update", json={"weight_version": version})
        if not self._asleep:
            await self._call(client, "POST", "/resume")
        self._paused = False

    async def rest(self, client: httpx.AsyncClient) -> None:
        """Put it to sleep, which frees its GPUs' memory; where that fails it is ended, which does too."""
        level = self._launch.sleep_level
        if self._process is None or self._asleep == _MEMORY:
            return
        try:
            await self._wake(client, "kv_cache")  # vLLM puts nothing to sleep while something sleeps
            if level == 2:  # should it ever answer without weights, no answer of that version counts
                await self._call(client, "POST", "/update_weight_version", json={"new_version": _DISCARDED})
            await self._call(client, "POST", "/sleep", params={"level": level})
            self._asleep = set(_MEMORY)
        except DownError as down:
            log.warning("%s: %s; it is started again for the next answers", self.name, down)
            self.restart()

    async def _start(self, weights: Weights) -> None:
        self.restart()  # end what is left of a server that died: its engines may still run and hold GPUs
        self._log.parent.mkdir(parents=True, exist_ok=True)

        def begin() -> None:
            if self._process is None:  # else it was begun in a round that ended meanwhile
                self._process = Process(
                    partial(self._launch.command, weights.model.folder),
                    self._launch.environment(self._index),
                    self._log,
                )
            self._url = self._process.url
            self._own_time = OwnTime(self._process.pid, self._own_time.tick_s)
            self._starting = Patience(self._own_time, self._settings.start_limit_s)

        await asyncio.get_running_loop().run_in_executor(self._starter, begin)

    async def _until_started(self, client: httpx.AsyncClient, process: Process, patience: Patience) -> None:
        """Wait until a process that was started is well. Raises DownError, ModelError."""
        while not patience.is_over:
            if not process.runs:
                if self._is_checked:
                    raise DownError("it ended while starting")
                self._require_memory(process.last_errors)
                raise ModelError(
                    f"vLLM ended while starting:\n{process.last_errors}",
                    where=str(self._log),
                    fix="see its log; rollout.arguments holds further arguments of vllm serve",
                )
            try:
                return await self.require_well(client)
            except DownError:
                await asyncio.sleep(_POLL_S)
        raise DownError(f"it did not start in {self._settings.start_limit_s:g} s")

    def _require_memory(self, errors: str) -> None:
        """Raise OutOfMemory if that is what vLLM's last errors say."""
        if what := shortage(errors):
            fix = share_advice(what, self._settings.share)
            raise OutOfMemory(f"vLLM ended while starting: {what} (log: {self._log})", fix=fix)

    async def require_well(self, client: httpx.AsyncClient) -> None:
        """Raises DownError unless its health check succeeds within the limit."""
        response = await self._send(client, self._settings.health_limit_s, "GET", "/health")
        if response.status_code != 200:
            raise DownError(f"it is not well: {response.status_code}")

    async def _require_fit(self, client: httpx.AsyncClient, weights: Weights) -> None:
        """Raises EndpointError for a server that is too old or was started with other flags."""
        try:
            version = str((await self._call(client, "GET", "/version")).json()["version"])
        except (ValueError, KeyError, TypeError) as error:
            fix = "correct rollout.urls: what listens there is another program"
            raise EndpointError("it does not answer as vLLM does", where=self.name, fix=fix) from error
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None or tuple(map(int, found.groups())) < OLDEST:
            fix = f"use vLLM {OLDEST[0]}.{OLDEST[1]} or newer"
            raise EndpointError(f"vLLM {version} is too old", where=self.name, fix=fix)
        info = (await self._call(client, "GET", "/server_info", params={"config_format": "json"})).json()
        served = info["vllm_config"]["model_config"]
        self.precision = "fp8" if served.get("quantization") else str(served.get("dtype", self._launch.dtype))
        self.precision = self.precision.removeprefix("torch.")
        if (mode := served["logprobs_mode"]) != "processed_logprobs":
            raise EndpointError(
                f"its logprobs are {mode}", where=self.name, fix=f"start it with {' '.join(flags(NEEDED))}"
            )
        length, needed = served["max_model_len"], self._launch.max_tokens
        if length < needed and not self._launch.fits_itself:
            longer = "take it out of rollout.arguments" if self._ours else f"start it with {needed}"
            raise EndpointError(
                f"a prompt and its answer may have {needed:,} tokens, and its --max-model-len is {length:,}",
                where=self.name,
                fix=f"{longer}, or lower prompt.max_tokens",
            )
        if weights.base is not None:
            self._require_adapters(info, read_json(weights.folder / "adapter_config.json")["r"])

    def _require_adapters(self, info: Mapping[str, Any], rank: int) -> None:
        """Raises EndpointError unless the server takes adapters of this rank while it runs."""
        highest = (info["vllm_config"]["lora_config"] or {"max_lora_rank": 0})["max_lora_rank"]
        if highest < rank or not info["vllm_env"][ADAPTER_SWITCH]:
            words = f"{ADAPTER_SWITCH}=1 in its environment and {' '.join(flags(adapter_arguments(rank)))}"
            fix = f"start it with {words}, or set rollout.lora=merged"
            raise EndpointError(f"it takes no adapters of rank {rank}", where=self.name, fix=fix)

    async def _load(self, client: httpx.AsyncClient, weights: Weights, has: str) -> None:
        """Load weights while paused, which also drops every cache that older weights filled.

        A server that sleeps is paused.
        """
        model, self._paused = weights.model, True
        if not self._asleep:
            await self._call(client, "POST", "/pause", params={"mode": "abort"})
        if model_of(has) != model.version:
            folder = {"method": "reload_weights", "kwargs": {"weights_path": str(model.folder)}}
            await self._call(client, "POST", "/collective_rpc", json=folder)
            await self._name(client, model)
        if weights is not model:
            await self._load_adapter(client, weights)
            await self._name(client, weights)
        if not self._asleep:
            await self._call(client, "POST", "/resume")
        self._paused = False

    async def _name(self, client: httpx.AsyncClient, weights: Weights) -> None:
        """Name the weights; every answer from now on carries the name."""
        await self._call(client, "POST", "/update_weight_version", json={"new_version": weights.version})

    async def _load_adapter(self, client: httpx.AsyncClient, weights: Weights) -> None:
        """Load an adapter and unload all others, whose folders are removed; vLLM caches by adapter name."""
        for card in (await self._call(client, "GET", "/v1/models")).json()["data"]:
            if card["parent"] is not None:
                await self._call(client, "POST", "/v1/unload_lora_adapter", json={"lora_name": card["id"]})
        named = {"lora_name": weights.version, "lora_path": str(weights.folder)}
        await self._call(client, "POST", "/v1/load_lora_adapter", json=named)

    async def _send(
        self, client: httpx.AsyncClient, limit_s: float, method: str, path: str, **content: Any
    ) -> httpx.Response:
        """Its response within so many seconds that it had. Raises DownError."""
        work = client.request(method, self._url + path, timeout=None, **content)
        try:
            return await within(Patience(self._own_time, limit_s), work)
        except (httpx.TransportError, TimeoutError) as error:
            raise DownError(f"{path}: {type(error).__name__}") from error

    async def _call(
        self, client: httpx.AsyncClient, method: str, path: str, **content: Any
    ) -> httpx.Response:
        response = await self._send(client, self._settings.start_limit_s, method, path, **content)
        if response.status_code == 404:
            fix = (
                f"start it with VLLM_SERVER_DEV_MODE=1 in its environment and with {' '.join(flags(NEEDED))}"
            )
            raise EndpointError(f"it has no {path}: {response.text[:200]}", where=self.name, fix=fix)
        if response.status_code != 200:
            raise DownError(f"{path}: {response.status_code} {response.text[:200]}")
        return response

    async def generate(
        self, client: httpx.AsyncClient, request: PromptRequest, weights: Weights
    ) -> tuple[Rollout, ...]:
        """Return the answers to one prompt, all by these weights.

        Raises RetryableError, DownError, or EndpointError if no further try can help.
        """
        return request.rollouts_from(await self._reply(client, request, weights))

    async def see(self, client: httpx.AsyncClient, request: PromptRequest, weights: Weights) -> Seen:
        """What it saw of one prompt, with its answer. Raises as `generate` does."""
        return request.seen_in(await self._reply(client, request, weights))

    async def _reply(
        self, client: httpx.AsyncClient, request: PromptRequest, weights: Weights
    ) -> Mapping[str, Any]:
        """The reply with all answers to a request, by these weights."""
        body = await asyncio.to_thread(request.body)
        if weights.base is not None:
            body["model"] = weights.version
        response = await self._send(client, self._settings.request_limit_s, "POST", GENERATE, json=body)
        if response.status_code == 429 or response.status_code >= 500:
            raise RetryableError(f"{self.name}: {response.status_code} {response.text[:200]}")
        if response.status_code == 404 and weights.version in response.text:
            raise DownError("it does not know the adapter: it was restarted", needs_restart=False)
        if response.status_code != 200:
            raise EndpointError(
                f"it refuses a prompt: {response.status_code} {response.text[:500]}",
                where=self.name,
                fix=f"vllm serve needs {' '.join(flags(NEEDED))}",
            )
        reply: dict[str, Any] = response.json()
        model = weights.version if weights.base is None else reply["model"]
        if weight_versions(reply) | {model} != {weights.version}:
            raise DownError("it answered with other weights: it was restarted", needs_restart=False)
        if not request.is_answered([choice["finish_reason"] for choice in reply["choices"]]):
            raise RetryableError(f"{self.name}: an answer was broken off")
        return reply

    def restart(self) -> None:
        """End the process, if there is one, at once; the next `up` starts it again."""
        if self._process is not None:
            self._process.end(at_once=True)
            self._process, self._asleep, self.channel = None, set(), ""
        self._starting = None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.end(at_once=False)
            self._process = None
