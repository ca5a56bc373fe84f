"""Hands out a model's weights for serving: whole, one after the other, in the dtype of the engine.

Under `torchrun` all ranks gather each tensor together and only rank 0 keeps what it writes, so that no
process ever holds the whole model beside its own share. Adapters are merged on the way.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from rlcs.model import lora
from rlcs.model.loading import writing_model
from rlcs.model.vlm import Vlm
from rlcs.storage import open_to_readers, read_json, write_json

SHARD_BYTES = 2 << 30
"""Size at which a file of weights is written and the next begins: what rank 0 holds in main memory."""


class _Gathered(Mapping[str, Tensor]):
    """The tensors of a model by name; looking one up gathers it, which all ranks must do together."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def serving_dtype(vlm: Vlm, compute: str) -> torch.dtype:
    """The dtype that a model is served in: its own, or of a sharded one `compute` (`same`: its own)."""
    dtype: torch.dtype = vlm.model.dtype
    return dtype if compute == "same" or not vlm.world.grouped else getattr(torch, compute)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def serving_weights(vlm: Vlm, dtype: torch.dtype, *, untied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every weight as the model's folder on the hub has them, in `dtype`.

    All ranks must iterate together. Tied weights come once, unless `untied`. In `reference_mode` adapters are
    left out; 4-bit weights come as what they stand for.
    """
    model: Any = vlm.model if vlm.adapter is None else vlm.adapter.get_base_model()
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    tied = dict(model._tied_weights_keys or {}) if _is_tied(vlm) else {}
    for name in state if vlm.adapter is None else lora.plain_names(model):
        if name in tied and not untied:
            continue
        if vlm.adapter is None:
            tensor = whole(_cast(state[name], dtype))  # cast first: half as much to gather
        else:
            merged = lora.merged_weight(model, _Gathered(state), name, reference_mode=vlm.reference_mode)
            tensor = _cast(merged, dtype)
        yield from revert_weight_conversion(model, {name: tensor}).items()


def write_serving(vlm: Vlm, folder: Path, dtype: torch.dtype, *, untied: bool = False) -> None:
    """Write a Hugging Face folder for vLLM on rank 0; all ranks must call it. Raises RunFolderError.

    `untied`: the head's weights are written beside those of the input embedding that they equal.
    """
    writer, failure = _Writer(folder), None
    for name, tensor in serving_weights(vlm, dtype, untied=untied):
        if vlm.world.rank == 0 and failure is None:
            try:
                writer.add(name, tensor)
            except (OSError, SafetensorError) as error:  # the others go on gathering: this rank must, too
                failure = error

    @writing_model(folder)
    def finish() -> None:
        if failure is not None:
            raise failure
        writer.finish()
        _describe(vlm, folder, dtype, untied=untied)
        open_to_readers(folder)

    vlm.world.first(finish)


class _Writer:
    """Writes tensors into files of about SHARD_BYTES and an index, or into one file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._files: dict[str, str] = {}
        self._number = 0

    def add(self, name: str, tensor: Tensor) -> None:
        # A copy: safetensors refuses tensors that share memory.
        self._held[name] = tensor.to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._number += 1
            self._write(f"model-{self._number:05d}.safetensors")

    def finish(self) -> None:
        if not self._number:
            return self._write("model.safetensors")
        if self._held:
            self._number += 1
            self._write(f"model-{self._number:05d}.safetensors")
        index = {"metadata": {"total_size": self._total}, "weight_map": self._files}
        write_json(self._folder / "model.safetensors.index.json", index)

    def _write(self, file: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(self._held, self._folder / file, metadata={"format": "pt"})
        self._files |= dict.fromkeys(self._held, file)
        self._total += self._bytes
        self._held, self._bytes = {}, 0


def _describe(vlm: Vlm, folder: Path, dtype: torch.dtype, *, untied: bool) -> None:
    """Write the configuration for these weights, and the processor."""
    model: Any = vlm.model if vlm.adapter is None else vlm.adapter.get_base_model()
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = read_json(path)
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__.removeprefix("FSDP")]
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
        if untied and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    if untied:
        config["tie_word_embeddings"] = False
    write_json(path, config)
    model.generation_config.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _is_tied(vlm: Vlm) -> bool:
    return vlm.model.get_output_embeddings().weight is vlm.model.get_input_embeddings().weight
