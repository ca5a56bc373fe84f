"""Exports a model as a Hugging Face folder that stock transformers and vLLM load without rlcs.

The folder has the settings of the training: pixel bounds in the processor, the system prompt as the chat
template's default, the sampling of the held-out measurement in the generation config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from rlcs.data.hub import cache_where_unreachable
from rlcs.errors import ModelError, RunFolderError
from rlcs.model import loading
from rlcs.model.chat import set_default_system
from rlcs.model.chat_format import ChatFormat
from rlcs.model.families import family_of
from rlcs.model.source import Source, find_source
from rlcs.model.template_rules import set_default_thinking
from rlcs.publish import card, quantise
from rlcs.recipe.schema import Eval
from rlcs.storage import atomic_write, open_to_readers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions of the weights by their short names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A requested export. `dtype` None keeps the precision of the weights; `name` None is the folder's name.

    `arm` and `step` choose among a run's models, as for `source.find_source`. `quantise` is a form of
    `quantise.BITS`, or None for whole weights.
    """

    model: str
    out: Path
    arm: str | None = None
    step: int | None = None
    dtype: str | None = None
    name: str | None = None
    quantise: str | None = None


def export(wanted: Export) -> list[Path]:
    """Write the folder and its card; returns its files. Raises UserError, ModelError or RunFolderError."""
    out = wanted.out
    if wanted.quantise is not None:
        quantise.check(wanted.quantise)
    source = find_source(wanted.model, wanted.arm, wanted.step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError("the folder is not empty", where=str(out), fix="name a new one with --out")
    with _weights(source, out) as weights:
        _write(wanted, source, weights)
    return sorted(path for path in out.rglob("*") if path.is_file())


@contextmanager
def _weights(source: Source, out: Path) -> Iterator[str]:
    """The folder or hub id of the weights; those of a checkpoint lie beside `out` for the moment."""
    if source.checkpoint is None or source.step is None or Path(source.weights).is_dir():
        yield loading.weights_of(source)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        loading.write_model(source, Path(folder))
        yield folder


def _write(wanted: Export, source: Source, weights: str) -> None:
    out = wanted.out
    options: dict[str, Any] = {"revision": source.revision}
    if source.recipe is not None:
        options["trust_remote_code"] = source.recipe.model.trust_remote_code
    try:
        dtype = DTYPES[wanted.dtype] if wanted.dtype else "auto"
        with cache_where_unreachable(weights):
            model = AutoModelForImageTextToText.from_pretrained(weights, dtype=dtype, **options)
            processor = AutoProcessor.from_pretrained(weights, **options)
    except (OSError, ValueError) as error:
        what = f"cannot load the model: {str(error).splitlines()[0]}"
        fix = "give a run folder, a folder in Hugging Face format, a hub id, or `builtin`"
        raise ModelError(what, where=wanted.model, fix=fix) from error
    family = family_of(model.config.model_type, wanted.model)
    family.save_as_published(model)
    if source.recipe is not None:  # the run's settings become the model's configuration
        recipe, images = source.recipe, source.recipe.images
        family.image_processing(processor, min_pixels=images.min_pixels, max_pixels=images.max_pixels)
        family.note_bounds(model.config, processor)
        if recipe.prompt.system is not None:
            set_default_system(processor, recipe.prompt.system, family.chat_format)
        if recipe.prompt.thinking is not None:
            set_default_thinking(processor, recipe.prompt.thinking, family.chat_format)
        model.generation_config = sampling_of(
            recipe.eval, model.generation_config, processor.tokenizer, family.chat_format
        )
    name = wanted.name or out.resolve().name
    converted = wanted.dtype is not None
    # Before quantising: the parameters of packed weights cannot be counted.
    text = card.render(source, name, model, converted=converted, quantised=wanted.quantise)
    with loading.writing_model(out):
        if wanted.quantise is None:
            model.save_pretrained(out)
        else:
            quantise.save(model, wanted.quantise, out)
        processor.save_pretrained(out)
        open_to_readers(out)
    atomic_write(out / "README.md", text)


def sampling_of(
    settings: Eval, old: GenerationConfig, tokenizer: Any, chat_format: ChatFormat
) -> GenerationConfig:
    """The sampling of the run's measurement, which also never generates ids that stand for images."""
    known = tokenizer.convert_tokens_to_ids(list(chat_format.banned))
    sampled = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return GenerationConfig(
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        suppress_tokens=sorted({i for i in known if i is not None and i != tokenizer.unk_token_id}),
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        **(sampled if settings.temperature > 0 else {}),
    )
