"""Loads, prepares and saves a vision-language model.

The built-in model is loaded like any other.
"""

import gc
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CompressedTensorsConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlcs.data.hub import cache_where_unreachable
from rlcs.data.images import OpenImage, open_image
from rlcs.distributed import ALONE, World
from rlcs.errors import (
    CheckpointError,
    ModelError,
    PromptError,
    RecipeError,
    RlcsError,
    RunFolderError,
    UserError,
)
from rlcs.model import attention
from rlcs.model import lora as adapters
from rlcs.model.chat import Chat, default_system, set_default_system
from rlcs.model.checkpoints import ADAPTER, read_weights
from rlcs.model.copies import copy_to_all
from rlcs.model.families import family_of
from rlcs.model.families.family import Family
from rlcs.model.file_faults import damaged_weights, require_tokenizer, template_errors
from rlcs.model.fsdp import shard, whole_weights
from rlcs.model.images import ImagePipeline
from rlcs.model.source import FINAL, Source, find_source
from rlcs.model.template_rules import rules_of, set_default_thinking
from rlcs.model.vlm import Vlm, require_alive
from rlcs.recipe.arms import ARMS, RL_ARMS, ArmName
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.schema import Images, Prompts, Recipe
from rlcs.recipe.schema import Model as ModelSettings
from rlcs.records import Problem
from rlcs.storage import MANIFEST, open_to_readers, read_json, write_json

log = logging.getLogger("rlcs")

_MADE_OF = "made_of.json"
"""Beside the weights of a checkpoint's model: the hash of that checkpoint's manifest."""


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables by which a user sets torch's allocator."""


def use_expandable_segments() -> None:
    """Let torch's allocator grow its segments: packs of many sizes leave less memory that nobody can use.

    To be called before anything lies on a GPU. What a user set in the environment stays; nothing is set there
    by us, so that vLLM's processes, which share memory between each other, do not inherit it.
    """
    if torch.version.cuda and torch.cuda.is_available() and not any(map(os.environ.get, ALLOCATOR)):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def give_back_memory() -> None:
    """Free what this process no longer uses: objects in reference cycles, and memory that torch caches.

    torch's allocator keeps the memory of its peak, which other processes cannot use.
    """
    gc.collect()
    torch.cuda.empty_cache()  # without CUDA this does nothing


def resolve(name: str) -> str:
    """The folder or hub id of the model behind a name, of any form that `source.find_source` knows.

    Raises UserError, RunFolderError, ModelError, CheckpointError.
    """
    return weights_of(find_source(name))


def weights_of(source: Source) -> str:
    """The folder or hub id of a model's weights.

    Of a checkpoint they are written first, into the run's folder and not a temporary one: `vllm serve` takes
    the place of this process and reads them later, and the next use finds them. Raises RunFolderError,
    CheckpointError.
    """
    folder, checkpoint = Path(source.weights), source.checkpoint
    if checkpoint is None:
        return source.weights
    if source.step is None:  # the base of a run, and a checkpoint of the run before
        return resolve(str(checkpoint))
    stamp = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    made = folder / _MADE_OF
    if made.is_file() and read_json(made)["manifest"] == stamp:
        return str(folder)
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        write_model(source, unfinished)
        write_json(unfinished / _MADE_OF, {"manifest": stamp})
        if folder.exists():  # made of a checkpoint that another has replaced
            shutil.rmtree(folder)
        unfinished.replace(folder)
    except (OSError, RunFolderError) as error:
        if not (made.is_file() and read_json(made)["manifest"] == stamp):  # by another process, meanwhile
            fix = f"free some space, or `rlcs export {source.run}/{source.arm}@{source.step} --out FOLDER` "
            fix += "on a disk that can be written to, and name that folder"
            why = error.what if isinstance(error, RunFolderError) else error
            what = f"the model of step {source.step} cannot be written here: {why}"
            raise RunFolderError(what, where=str(folder), fix=fix) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def write_model(source: Source, folder: Path) -> None:
    """Write the model of a run's checkpoint in Hugging Face format, as its stage would have ended with it.

    The weights are read from disk one by one, adapters are merged, the optimiser's state is not read. Raises
    CheckpointError, ModelError, RunFolderError.
    """
    recipe, checkpoint, step = source.recipe, source.checkpoint, source.step
    assert recipe and source.run and source.arm and checkpoint and step is not None, "of a run's checkpoint"
    weights = read_weights(checkpoint, step)
    settings = start_of(recipe, source.run, source.arm)
    frozen = recipe.sft.freeze if source.arm == "sft" else recipe.grpo.freeze
    if recipe.lora.rank:
        vlm = prepare(load(settings, four_bit=recipe.lora.four_bit), recipe.lora, frozen, seed=recipe.seed)
    else:
        vlm = load(settings, weights=False)
        with suppress(OSError):  # a model without one keeps the library's
            start = resolve(settings.name)
            old = GenerationConfig.from_pretrained(start, revision=settings.revision)
            vlm.model.generation_config = old
    make_chat(vlm, recipe.prompt, recipe.images, rl=source.arm in RL_ARMS)
    names = {name for name in vlm.model.state_dict() if not recipe.lora.rank or ADAPTER in name}
    if names != weights.keys():
        raise CheckpointError(
            "it is of another model", where=str(checkpoint), fix="see the run's recipe.yaml"
        )
    vlm.model.load_state_dict(weights, strict=False, assign=not recipe.lora.rank)
    vlm.model.tie_weights()
    save(vlm, folder)


def start_of(recipe: Recipe, run: Path, arm: ArmName) -> ModelSettings:
    """The model from which the training of an arm starts, as a training stage loads it."""
    parent = ARMS[arm].parent
    if parent is None or ARMS[parent].parent is None:
        return recipe.learner
    return recipe.learner.model_copy(update={"name": str(run / parent / FINAL), "revision": None})


def load(
    settings: ModelSettings,
    *,
    device: torch.device | None = None,
    world: World = ALONE,
    four_bit: bool = False,
    weights: bool = True,
) -> Vlm:
    """Load a model from a folder, the hub or the package; `four_bit` for QLoRA. Raises ModelError, UserError.

    Without `weights` only the structure is loaded, which takes no memory: for a model in another program.
    Under `torchrun` rank 0 alone has the weights, on the CPU, until `spread` gives every rank its shard.
    """
    if world.grouped:  # a checkpoint's model is written once, by rank 0
        world.first(lambda: _source(settings))
    device = device or world.device or default_device()
    attention.require_usable(settings.attention, device)
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, automatic if settings.dtype == "auto" else settings.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    config, processor, family = _load_description(settings)
    if four_bit:
        if world.grouped:
            fix = "start one process (parallel.processes=1, no `torchrun`), or set lora.four_bit=false"
            error = UserError("4-bit weights cannot be spread over processes", where="lora.four_bit", fix=fix)
            error.reported = world.rank > 0
            raise error
        options |= adapters.four_bit(dtype, device, experts=family.experts is not None)
    if getattr(config, "quantization_config", {}).get("quant_method") == "compressed-tensors":
        if find_spec("compressed_tensors") is None:
            what, fix = "the model is quantised", "pip install 'rlcs[quantise]'"
            raise ModelError(what, where=f"model.name={settings.name}", fix=fix)
        # Dequantised while loading: engines call parts of the model, which do not trigger its own hook.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with _files_of(settings) as source:
        if weights and world.rank == 0:
            model = AutoModelForImageTextToText.from_pretrained(**source, config=config, **options)
            require_alive(model if world.grouped else model.to(device), settings.name)
        else:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(
                    config, dtype=dtype, trust_remote_code=settings.trust_remote_code
                )
            model.eval()
    family.install(model)
    family.save_as_published(model)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return Vlm(
        model=model.to(device) if weights and not world.grouped else model,
        processor=processor,
        family=family,
        attention=settings.attention,
        fused_loss=settings.fused_loss,
        router_loss=_router_loss(settings, family, config),
        device=device,
        world=world,
    )


def _router_loss(settings: ModelSettings, family: Family, config: Any) -> float:
    """The weight of the loss that balances experts. Raises UserError for a weight without experts."""
    if family.router is None:
        if settings.router_loss:
            what = f"models of type {family.model_type} have no experts to balance"
            raise UserError(what, where="model.router_loss", fix="leave it out")
        return 0.0
    text = config.get_text_config()
    own = text.router_aux_loss_coef if text.output_router_logits else 0.0
    return float(own if settings.router_loss is None else settings.router_loss)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass.

    transformers makes the inputs of towers and layers require gradients with it, which only reentrant
    checkpointing needs: a frozen tower would have a backward pass for nothing.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def spread(vlm: Vlm, settings: Parallel) -> Vlm:
    """Shard the model over the ranks of its world, or copy it to all; with one process return it unchanged.

    Raises UserError for settings that only a sharded model can have.
    """
    if vlm.world.has_copies and not any(settings.of_shards.values()):
        copy_to_all(vlm.model, vlm.world)
    elif vlm.world.grouped:
        return replace(vlm, fsdp_root=shard(vlm.model, vlm.world, settings))
    else:
        require_unsharded(settings)
    return vlm


def require_unsharded(settings: Parallel) -> None:
    """Raise UserError for settings that only a sharded model can have."""
    for key, is_set in settings.of_shards.items():
        if is_set:
            raise UserError(
                "mixed precision and offloading belong to sharded models",
                where=f"parallel.{key}",
                fix="start with `torchrun --nproc-per-node N -m rlcs ...` (N may be 1), or leave it out",
            )


def freeze(vlm: Vlm, parts: Sequence[str]) -> None:
    """Freeze the named parts of `Family`, and unfreeze all others.

    Raises RecipeError for experts or a router that the model does not have.
    """
    if missing := [part for part in parts if getattr(vlm.family, part) is None]:
        fix = f"leave {' and '.join(missing)} out: models of type {vlm.family.model_type} are no mixtures"
        raise RecipeError(f"the model has no {' and no '.join(missing)}", where="freeze", fix=fix)
    patterns = [re.compile(getattr(vlm.family, part)) for part in parts]
    patterns += [re.compile(vlm.family.unused)] if vlm.family.unused else []
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(not any(pattern.search(name) for pattern in patterns))


def prepare(vlm: Vlm, lora: Lora, frozen: Sequence[str], *, seed: int) -> Vlm:
    """Prepare a model for a training stage: freeze parts, or freeze everything and add adapters."""
    if lora.rank:
        parts = [getattr(vlm.family, part) for part in lora.parts if part not in frozen]
        vlm = replace(
            vlm, adapter=adapters.attach(vlm.model, lora, parts, router=vlm.family.router, seed=seed)
        )
    else:
        freeze(vlm, frozen)
    trains = any(re.search(vlm.family.vision_tower, name) for name, _ in vlm.parameters())
    return vlm if trains else replace(vlm, frozen_tower=object())


def make_chat(
    vlm: Vlm,
    prompts: Prompts = Prompts(),  # noqa: B008 - frozen
    images: Images = Images(),  # noqa: B008 - frozen
    *,
    rl: bool = False,
    decode: OpenImage = open_image,
) -> Chat:
    """Make the chat format of a model; `rl`: with the system prompt and image bounds of RL.

    Images are opened by `decode`. The pixel bounds and the system prompt are set on the processor too, so
    that they are saved with the model.
    """
    chat = _chat(vlm.processor, vlm.family, prompts, images, rl=rl, decode=decode)
    vlm.family.note_bounds(vlm.model.config, vlm.processor)
    return chat


def load_chat(model: ModelSettings, prompts: Prompts, images: Images, *, rl: bool = False) -> Chat:
    """Make the chat format of a model that is not loaded, as `make_chat` does, from its processor alone.

    Raises ModelError.
    """
    _, processor, family = _load_description(model)
    return _chat(processor, family, prompts, images, rl=rl)


def load_config(name: str, revision: str | None = None) -> Any:
    """Load the configuration of the model behind a name, as `resolve` knows them. Raises ModelError."""
    settings = ModelSettings(name=name, revision=revision)
    with _files_of(settings) as source:
        return AutoConfig.from_pretrained(**source)


def _source(settings: ModelSettings) -> dict[str, Any]:
    """Where `from_pretrained` finds a model. Raises ModelError."""
    try:
        folder = resolve(settings.name)
    except ModelError as error:
        where = f"model.name={settings.name}" if error.where == settings.name else error.where
        raise ModelError(error.what, where=where, fix=error.fix) from error
    return {
        "pretrained_model_name_or_path": folder,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
    }


def _load_description(settings: ModelSettings) -> tuple[Any, Any, Family]:
    """Load the configuration and processor of a model, and find its family. Raises ModelError."""
    with _files_of(settings) as source:
        config = AutoConfig.from_pretrained(**source)
        family = family_of(config.model_type, settings.name)
        written, _ = PreTrainedConfig.get_config_dict(**source)
        family.complete(config, written, f"model.name={settings.name}")
        require_tokenizer(source["pretrained_model_name_or_path"])
        return config, AutoProcessor.from_pretrained(**source), family


@contextmanager
def _files_of(settings: ModelSettings) -> Iterator[dict[str, Any]]:
    """Where `from_pretrained` finds a model; its errors meanwhile become ModelError."""
    source = _source(settings)
    folder = source["pretrained_model_name_or_path"]
    try:
        with cache_where_unreachable(folder):
            yield source
    except RlcsError:
        raise
    except Exception as error:
        # The tokenizers' library raises nothing more precise than Exception.
        if not isinstance(error, OSError | ValueError | SafetensorError) and type(error) is not Exception:
            raise
        fix = "give a run folder, a folder in Hugging Face format, a hub id, or `builtin`"
        if (damaged := damaged_weights(Path(folder))) is not None:
            fix = f"{damaged} is cut off or damaged: copy or download it again"
        raise ModelError(
            f"cannot load the model: {(str(error) or type(error).__name__).splitlines()[0]}",
            where=f"model.name={settings.name}",
            fix=fix,
        ) from error


@template_errors()
def _chat(
    processor: Any,
    family: Family,
    prompts: Prompts,
    images: Images,
    *,
    rl: bool,
    decode: OpenImage = open_image,
) -> Chat:
    smallest = (images.rl_min_pixels if rl else None) or images.min_pixels
    processing = family.image_processing(processor, min_pixels=smallest, max_pixels=images.max_pixels)
    default = family.default_system
    if processor.chat_template:
        default = default_system(processor, family.chat_format)
        if prompts.system is not None:
            set_default_system(processor, prompts.system, family.chat_format)
    rules = rules_of(processor, family.chat_format, thinking=prompts.thinking)
    if prompts.thinking is not None:
        set_default_thinking(processor, prompts.thinking, family.chat_format)
    chat = Chat(
        processor.tokenizer,
        ImagePipeline(
            processing,
            decode_limit=images.decode_limit,
            cache_bytes=int(images.cache_gb * 2**30),
            workers=images.workers,
            decode=decode,
        ),
        family=family,
        system=prompts.system,
        max_tokens=prompts.max_tokens,
        default_system=default,
        rules=rules,
    )
    _compare_with_template(processor, chat)
    return chat.with_system(prompts.rl_system) if rl and prompts.rl_system is not None else chat


def _compare_with_template(processor: Any, chat: Chat) -> None:
    """Warn if the model's chat template, which servers use, renders a prompt differently from `chat`."""
    if not processor.chat_template:
        return
    turn = [{"role": "user", "content": [{"type": "text", "text": "1"}]}]
    rendered = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    problem = Problem(id="template", source="template", question="1", answer="1")
    try:
        in_training = "".join(map(chat.token, chat.prompt(problem).ids))
    except PromptError:  # a limit below the system prompt's length; every real prompt raises it too
        return
    if in_training != rendered:
        log.warning(
            "the model's chat template renders %r; rlcs trains and measures with %r", rendered, in_training
        )


@contextmanager
def writing_model(folder: Path) -> Iterator[None]:
    """Raise RunFolderError where the files of a model cannot be written, on a full disk say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "free some space, or choose a folder on another disk"
        raise RunFolderError(f"cannot write the model: {error}", where=str(folder), fix=fix) from error


def save(vlm: Vlm, folder: Path) -> None:
    """Write a Hugging Face folder on rank 0: weights (safetensors), configuration, processor.

    Adapters are merged into the weights, and also saved in peft's format in `folder/adapter`; in
    `reference_mode` they are left out. Raises RunFolderError if the disk is full.
    """
    weights = whole_weights(vlm.model, vlm.world) if vlm.fsdp_root is not None else None

    @writing_model(folder)
    def write() -> None:
        if vlm.adapter is None:
            vlm.model.save_pretrained(folder, state_dict=weights)
        else:
            whole = weights or vlm.model.state_dict()
            merged = adapters.merged(vlm.adapter, whole, reference_mode=vlm.reference_mode)
            vlm.family.save_as_published(merged)
            merged.save_pretrained(folder)
            if not vlm.reference_mode:
                adapters.save(vlm.adapter, folder / "adapter", whole)
        vlm.processor.save_pretrained(folder)
        open_to_readers(folder, sync=True)

    vlm.world.first(write)


def save_adapters(vlm: Vlm, folder: Path) -> None:
    """Write only the adapters of an adapted model, in peft's format, on rank 0."""
    adapter = vlm.adapter
    assert adapter is not None
    weights = whole_weights(vlm.model, vlm.world, having=".lora_") if vlm.fsdp_root is not None else None

    @writing_model(folder)
    def write() -> None:
        adapters.save(adapter, folder, weights or vlm.model.state_dict())
        open_to_readers(folder, sync=True)

    vlm.world.first(write)
