"""Opens the engine that a recipe names, and closes it at the end."""

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcs.distributed import visible_gpus
from rlcs.engines.base import Engine
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.readiness import server_gpus
from rlcs.engines.vllm.server import RECURRENT_DTYPES, Launch
from rlcs.engines.vllm.transfer import IpcChannel, NcclChannel, Transfer
from rlcs.engines.vllm.weights import MEMORY, Unchanged, WeightsFolder
from rlcs.errors import UserError
from rlcs.model.chat import Chat
from rlcs.model.delta_net import is_recurrent
from rlcs.model.serving_weights import serving_dtype
from rlcs.model.vlm import Vlm
from rlcs.recipe.sampling import Rollouts

EXPERTS_STALE_ON_CPU = True
"""Whether vLLM takes new weights of experts wrongly on a CPU: 0.32 and 0.33 pack only the first ones for
their kernel (`UnquantizedFusedMoEMethod._setup_kernel`)."""
MakeEngine = Callable[[Vlm, Chat, int], Engine]
"""Makes an engine from a model, its chat format and the most rollouts at once."""


@dataclass(frozen=True, kw_only=True)
class EngineNeeds:
    """Settings and limits for the engines of a run.

    `max_tokens` bounds a prompt with its answer, `max_rows` the rollouts at once. Weights go to vLLM as LoRA
    adapters of `adapter_rank`, or whole where that is 0; `name` is the run's in a folder of several runs.
    """

    settings: Rollouts
    max_tokens: int
    max_rows: int
    compute_dtype: str = "same"
    adapter_rank: int = 0
    name: str = ""

    def launch(self, vlm: Vlm, *, trains: bool = True) -> Launch:
        """Settings to start vLLM for a model: in its dtype, or the computing dtype of a sharded one.

        Raises UserError if a rank has too few GPUs for its server, or vLLM no kernels for the model.
        """
        colocated = self.settings.engine == "vllm_colocated"
        on_cpu = vlm.device.type == "cpu"
        sleeps = colocated and trains and not on_cpu  # vLLM has no sleep mode on a CPU
        dtype = str(serving_dtype(vlm, self.compute_dtype)).removeprefix("torch.")
        recurrent = is_recurrent(vlm.model.config)
        if on_cpu and not self.settings.urls:  # where those are, nobody knows
            _require_kernels(vlm.model.config, dtype, self.adapter_rank, trains=trains)
        return Launch(
            settings=self.settings,
            dtype=dtype,
            max_tokens=self.max_tokens,
            max_rows=self.max_rows,
            on_cpu=on_cpu,
            adapter_rank=self.adapter_rank,
            number=vlm.world.rank if colocated else 0,
            gpus=_own_gpus(vlm, self.settings.tensor_parallel) if colocated and not on_cpu else "",
            shares_gpu=not on_cpu and _shares_gpu(vlm, self.settings),
            sleep_level=(1 if self.adapter_rank else 2) if sleeps else 0,
            transfer=self._transfer(on_cpu) if trains else "",
            is_recurrent=recurrent,
        )

    def _transfer(self, on_cpu: bool) -> str:
        """VLLM's way to receive weights; empty: through a folder. Raises UserError if there must be one."""
        settings = self.settings
        elsewhere = bool(settings.urls) and settings.weights == "auto"  # started by others, with their flags
        if settings.weights == "folder" or self.adapter_rank or elsewhere:
            return ""
        if on_cpu:
            if settings.weights == "transfer":
                raise UserError(
                    "vLLM has no weight transfer on a CPU",
                    where="rollout.weights=transfer",
                    fix="set rollout.weights=folder",
                )
            return ""
        return "ipc" if settings.engine == "vllm_colocated" else "nccl"

    def transfer(self, vlm: Vlm, fleet: Fleet, launch: Launch) -> Transfer | None:
        """How weights reach the servers of this fleet without a folder, if they can."""
        if not launch.transfer:
            return None
        ranks = self.settings.tensor_parallel if launch.transfer == "ipc" else vlm.world.size
        nccl = NcclChannel(self.settings.tensor_parallel, self.settings.start_limit_s)
        channel = IpcChannel(vlm, ranks) if launch.transfer == "ipc" else nccl
        required = self.settings.weights == "transfer"
        return Transfer(fleet, channel, ranks=ranks, compute_dtype=self.compute_dtype, required=required)

    def weights(self, folder: Path, vlm: Vlm) -> WeightsFolder:
        """Where models like this one are published: in main memory if this machine alone reads them."""
        settings = self.settings
        hosts = set(vlm.world.gather(socket.gethostname())) if settings.engine == "vllm_colocated" else {""}
        here = len(hosts) == 1 and not settings.urls and settings.weights_folder is None
        return WeightsFolder(
            self.weights_folder(folder),
            as_adapters=self.adapter_rank > 0,
            compute_dtype=self.compute_dtype,
            memory=MEMORY if here and vlm.device.type == "cuda" else None,
        )

    def weights_folder(self, folder: Path) -> Path:
        """The folder for the published weights of the run in `folder`."""
        if self.settings.weights_folder is None:
            return folder / "weights"
        digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
        return Path(self.settings.weights_folder) / f"{self.name}-{digest}"


@contextmanager
def open_engines(needs: EngineNeeds, folder: Path, *, unchanged: str | None = None) -> Iterator[MakeEngine]:
    """Open the engines of one run, which share its vLLM servers; `folder` is for their logs and weights.

    vLLM starts with the first engine and ends with the context. `unchanged` is a folder or hub id of a
    model that does not train, which vLLM then reads directly.
    """
    settings = needs.settings
    backend: Fleet | None = None
    transfer: Transfer | None = None
    processing: dict[str, Any] = {}
    published: WeightsFolder | None = None if unchanged is None else Unchanged(unchanged)

    def make(vlm: Vlm, chat: Chat, max_rows: int) -> Engine:
        nonlocal backend, processing, published, transfer
        _require_replay(vlm, settings)
        if settings.engine == "local":
            return LocalEngine(vlm, chat, max_rows=max_rows, keeps_routes=settings.router_replay)
        published = published or needs.weights(folder, vlm)
        if backend is not None and processing != vlm.processor.image_processor.to_dict():
            backend.close()  # vLLM keeps the pixel bounds that it started with
            backend = None
        if backend is None:
            processing = vlm.processor.image_processor.to_dict()
            launch = needs.launch(vlm, trains=unchanged is None)
            backend = Fleet(settings, logs=folder, launch=launch)
            transfer = needs.transfer(vlm, backend, launch)
        ranks = settings.tensor_parallel if settings.engine == "vllm_colocated" else None
        return VllmEngine(
            backend,
            published,
            vlm,
            chat,
            ranks=ranks,
            transfer=transfer,
            keeps_routes=settings.router_replay,
        )

    try:
        yield make
    finally:
        if backend is not None:
            backend.close()
        if published is not None:
            published.remove()


def _require_replay(vlm: Vlm, settings: Rollouts) -> None:
    """Raise UserError if experts are to be replayed that the model lacks, or the engine cannot tell."""
    if not settings.router_replay:
        return
    if vlm.family.router is None:
        what = f"models of type {vlm.family.model_type} have no experts whose choice could be replayed"
    elif settings.engine != "local" and not settings.urls and vlm.device.type == "cpu":
        what = "on a CPU vLLM does not say which experts it chose"
    else:
        return
    raise UserError(what, where="rollout.router_replay", fix="set it to false")


def _require_kernels(config: Any, dtype: str, adapter_rank: int, *, trains: bool) -> None:
    """Raise UserError for what vLLM 0.32 cannot compute on a CPU, or computes wrongly."""
    if trains and EXPERTS_STALE_ON_CPU and getattr(config.get_text_config(), "num_experts", None):
        raise UserError(
            "on a CPU vLLM computes wrong answers once it has new weights of a mixture of experts",
            where="rollout.engine",
            fix="set rollout.engine=local",
        )
    if not is_recurrent(config):
        return
    if dtype not in RECURRENT_DTYPES:
        raise UserError(
            f"vLLM computes gated delta nets on a CPU in {', '.join(RECURRENT_DTYPES)} only, not in {dtype}",
            where="rollout.engine",
            fix="set rollout.engine=local, or model.dtype=bfloat16",
        )
    if adapter_rank:
        raise UserError(
            "vLLM takes no LoRA adapters for gated delta nets on a CPU",
            where="rollout.lora",
            fix="set rollout.lora=merged",
        )


def _shares_gpu(vlm: Vlm, settings: Rollouts) -> bool:
    first, visible = vlm.device.index or 0, visible_gpus()
    return not server_gpus(settings, visible).isdisjoint(visible[first : first + 1])


def _own_gpus(vlm: Vlm, count: int) -> str:
    """The GPUs of the server that this rank starts, its own first, as in CUDA_VISIBLE_DEVICES.

    Only the first of every `count` ranks starts one. Raises UserError if there are too few.
    """
    first, visible = vlm.device.index or 0, visible_gpus()
    if vlm.world.size % count and vlm.world.size > 1:
        raise UserError(
            f"{vlm.world.size} ranks do not make groups of {count} GPUs for a server each",
            where="rollout.tensor_parallel",
            fix="choose a divisor of the number of ranks",
        )
    if vlm.world.rank % count == 0 and len(visible) < first + count:
        raise UserError(
            f"a server needs {count} GPUs, and this process sees {len(visible)}",
            where="rollout.tensor_parallel",
            fix="lower it, or name more GPUs in CUDA_VISIBLE_DEVICES",
        )
    return ",".join(visible[first : first + count])
