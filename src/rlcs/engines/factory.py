"""Opens the engine that a recipe names, and closes it at the end."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rlcs.engines.base import Engine
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.colocated import Colocated
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.server import Launch
from rlcs.engines.vllm.weights import Unchanged, WeightsFolder
from rlcs.errors import UserError
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.recipe.sampling import Rollouts

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
    decode_limit: int
    compute_dtype: str = "same"
    adapter_rank: int = 0
    name: str = ""

    def launch(self, vlm: Vlm) -> Launch:
        """Settings to start vLLM for a model: in its dtype, or the computing dtype of a sharded one."""
        loaded = str(vlm.model.dtype).removeprefix("torch.")
        return Launch(
            settings=self.settings,
            dtype=loaded if self.compute_dtype == "same" or not vlm.world.grouped else self.compute_dtype,
            max_tokens=self.max_tokens,
            max_rows=self.max_rows,
            on_cpu=vlm.device.type == "cpu",
            adapter_rank=self.adapter_rank,
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
    backend: Fleet | Colocated | None = None
    bounds: dict[str, int] = {}
    published = WeightsFolder(needs.weights_folder(folder), as_adapters=needs.adapter_rank > 0)
    if unchanged is not None:
        published = Unchanged(unchanged)

    def make(vlm: Vlm, chat: Chat, max_rows: int) -> Engine:
        nonlocal backend, bounds
        if settings.engine == "local":
            return LocalEngine(vlm, chat, max_rows=max_rows)
        if backend is not None and bounds != dict(vlm.processor.image_processor.size):
            backend.close()  # vLLM keeps the pixel bounds that it started with
            backend = None
        if backend is None:
            bounds = dict(vlm.processor.image_processor.size)
            launch = needs.launch(vlm)
            if settings.engine == "vllm_colocated":
                if torch.distributed.is_initialized():
                    raise UserError(
                        "vLLM inside a training process works with one process only",
                        where="rollout.engine=vllm_colocated",
                        fix="use rollout.engine=vllm_server with torchrun",
                    )
                backend = Colocated(launch, sleeps=unchanged is None)
            else:
                backend = Fleet(settings, logs=folder, launch=launch)
        return VllmEngine(backend, published, vlm, chat, decode_limit=needs.decode_limit)

    try:
        yield make
    finally:
        if backend is not None:
            backend.close()
        published.remove()
