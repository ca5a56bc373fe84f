"""Load, prepare and save a vision-language model.

The built-in model and a hub model take the same path. What a family needs is in `FAMILIES`.
"""

import gc
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CompressedTensorsConfig,
    PreTrainedModel,
)

from rlcs.distributed import ALONE, World
from rlcs.errors import ModelError, PromptError, UserError
from rlcs.model import attention
from rlcs.model import lora as adapters
from rlcs.model.chat import DEFAULT_SYSTEM, Chat, default_system, set_default_system
from rlcs.model.fsdp import FsdpRoot, shard, whole_weights
from rlcs.model.images import ImagePipeline
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.schema import Model as ModelSettings
from rlcs.recipe.schema import Recipe
from rlcs.records import Problem
from rlcs.storage import open_to_readers

if TYPE_CHECKING:
    from peft import PeftModel


log = logging.getLogger("rlcs")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What differs between families of models.

    Where the parts live: a pattern on parameter names for each part. `default_system` is what the chat
    template puts in when there is no system message; None: no system turn.
    """

    vision_tower: str
    merger: str
    language_model: str = r"^(model\.language_model\.|lm_head\.)"
    default_system: str | None


_QWEN_2 = Family(
    vision_tower=r"^model\.visual\.(?!merger\.)",
    merger=r"^model\.visual\.merger\.",
    default_system=DEFAULT_SYSTEM,
)
_QWEN_3 = Family(
    vision_tower=r"^model\.visual\.(?!merger\.|deepstack_merger_list\.)",
    merger=r"^model\.visual\.(merger|deepstack_merger_list)\.",
    default_system=None,
)
FAMILIES = {"qwen2_vl": _QWEN_2, "qwen2_5_vl": _QWEN_2, "qwen3_vl": _QWEN_3}
"""Model types that rlcs trains, by the `model_type` of their configuration."""


@dataclass(frozen=True, kw_only=True)
class Vlm:
    """A model with its processor, ready for packs; under `torchrun` in shards (`fsdp_root`) over `world`.

    `adapter` is peft's handle on the low-rank layers inside `model`, where those train; `reference_mode`
    scores as if there were none: the reference of GRPO.
    """

    model: PreTrainedModel
    processor: Any
    family: Family
    attention: str
    device: torch.device
    adapter: "PeftModel | None" = None
    reference_mode: bool = False
    world: World = ALONE
    fsdp_root: FsdpRoot | None = None

    def scoring(self) -> AbstractContextManager[None]:
        """The state to score in: adapters off if `reference_mode`."""
        if self.adapter is None or not self.reference_mode:
            return nullcontext()
        return self.adapter.disable_adapter()

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name; tied weights once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def run(self, work: Callable[[], T]) -> T:
        """Work that calls the model, with its weights there; it returns a tensor or a tuple of them.

        All ranks must run as often, in the same order, with images or without.
        """
        return work() if self.fsdp_root is None else self.fsdp_root.run(work)

    def gathered(self) -> AbstractContextManager[None]:
        """All weights on every rank, to call the model without keeping step; no gradients."""
        return nullcontext() if self.fsdp_root is None else self.fsdp_root.gathered()


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def give_back_memory() -> None:
    """Give back what this process no longer uses: objects in dead circles, and memory that torch keeps.

    torch's allocator keeps the peak of all that it ever held, and other processes see that as taken.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing happens without CUDA


def resolve(name: str) -> str:
    """The folder or hub id behind a model name; `builtin` is the tiny model in the package."""
    if name == "builtin":
        return str(resources.files("rlcs") / "builtin_model")
    return name


def load(
    settings: ModelSettings,
    *,
    device: torch.device | None = None,
    world: World = ALONE,
    four_bit: bool = False,
    weights: bool = True,
) -> Vlm:
    """Load a model from a folder, the hub or the package; `four_bit` for QLoRA. Raises ModelError, UserError.

    Without `weights` it has its form alone and takes no memory: for a model that another program runs.
    Under `torchrun` rank 0 alone has the weights, on the CPU, until `spread` gives every rank its share.
    """
    device = device or world.device or default_device()
    attention.require_usable(settings.attention, device)
    source = resolve(settings.name)
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    how: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if four_bit:
        if world.grouped:
            raise UserError(
                "4-bit weights cannot be spread over processes",
                where="lora.four_bit",
                fix="start without `torchrun`, or set lora.four_bit=false",
            )
        how |= adapters.four_bit(getattr(torch, dtype), device)
    config, processor = _described(settings)
    family = _family(config.model_type, settings.name)
    if getattr(config, "quantization_config", {}).get("quant_method") == "compressed-tensors":
        if find_spec("compressed_tensors") is None:
            what, fix = "the model is quantised", "pip install 'rlcs[quantise]'"
            raise ModelError(what, where=f"model.name={settings.name}", fix=fix)
        # Spelled out while loading: engines call the model's parts, and its own hook waits for the whole.
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with _told(settings):
        if weights and world.rank == 0:
            model = AutoModelForImageTextToText.from_pretrained(source, **how, **options)
        else:
            model = _weightless(config, getattr(torch, dtype), settings)
    attention.install(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Vlm(
        model=model.to(device) if weights and not world.grouped else model,
        processor=processor,
        family=family,
        attention=settings.attention,
        device=device,
        world=world,
    )


def _weightless(config: Any, dtype: torch.dtype, settings: ModelSettings) -> PreTrainedModel:
    """The model's form without any memory, for ranks that get their weights from rank 0."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    return model.eval()


def spread(vlm: Vlm, settings: Parallel) -> Vlm:
    """The model in shards over the ranks of its world; without `torchrun` the model as it is.

    Raises UserError for choices that only a sharded model can have.
    """
    if vlm.world.grouped:
        return replace(vlm, fsdp_root=shard(vlm.model, vlm.world, settings))
    for key in ("compute_dtype", "reduce_dtype", "cpu_offload"):
        if getattr(settings, key) not in ("same", False):
            raise UserError(
                "mixed precision and offloading belong to sharded models",
                where=f"parallel.{key}",
                fix="start with `torchrun --nproc-per-node N -m rlcs ...` (N may be 1), or leave it out",
            )
    return vlm


def _family(model_type: str, name: str) -> Family:
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} are not supported",
            where=f"model.name={name}",
            fix=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def freeze(vlm: Vlm, parts: Sequence[str]) -> None:
    """Freeze the named parts (`vision_tower`, `merger`, `language_model`) and unfreeze all others."""
    patterns = [re.compile(getattr(vlm.family, part)) for part in parts]
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(not any(pattern.search(name) for pattern in patterns))


def prepare(vlm: Vlm, lora: Lora, frozen: Sequence[str], *, seed: int) -> Vlm:
    """The model of a training stage: parts frozen, or everything frozen under new adapters."""
    if not lora.rank:
        freeze(vlm, frozen)
        return vlm
    parts = [getattr(vlm.family, part) for part in lora.parts if part not in frozen]
    return replace(vlm, adapter=adapters.attach(vlm.model, lora, parts, seed=seed))


def make_chat(vlm: Vlm, recipe: Recipe, *, rl: bool = False) -> Chat:
    """The chat format and image path of a model under a recipe; `rl`: with the image bounds of RL.

    The pixel bounds and the system prompt are written onto the processor too, so that a saved model
    carries them.
    """
    return _chat(vlm.processor, vlm.family, recipe, rl=rl)


def load_chat(recipe: Recipe) -> Chat:
    """The same of the recipe's model, without its weights. Raises ModelError."""
    config, processor = _described(recipe.model)
    return _chat(processor, _family(config.model_type, recipe.model.name), recipe, rl=False)


def _described(settings: ModelSettings) -> tuple[Any, Any]:
    """Configuration and processor of a model. Raises ModelError."""
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    source = resolve(settings.name)
    with _told(settings):
        return (
            AutoConfig.from_pretrained(source, **options),
            AutoProcessor.from_pretrained(source, **options),
        )


@contextmanager
def _told(settings: ModelSettings) -> Iterator[None]:
    """Errors of transformers while it loads a model, as ModelError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the model: {str(error).splitlines()[0]}",
            where=f"model.name={settings.name}",
            fix="give a folder in Hugging Face format, a hub id, or `builtin`",
        ) from error


def _chat(processor: Any, family: Family, recipe: Recipe, *, rl: bool) -> Chat:
    smallest = (recipe.images.rl_min_pixels if rl else None) or recipe.images.min_pixels
    bounds = {"shortest_edge": smallest, "longest_edge": recipe.images.max_pixels}
    processor.image_processor.size = bounds
    default = family.default_system
    if processor.chat_template:
        default = default_system(processor)
        if recipe.prompt.system is not None:
            set_default_system(processor, recipe.prompt.system)
    images = ImagePipeline(processor.image_processor, decode_limit=recipe.images.decode_limit)
    chat = Chat(
        processor.tokenizer,
        images,
        system=recipe.prompt.system,
        max_tokens=recipe.prompt.max_tokens,
        default_system=default,
    )
    _compare_with_template(processor, chat)
    return chat


def _compare_with_template(processor: Any, chat: Chat) -> None:
    """Warn if the model's own chat template, which servers use, words a prompt otherwise than `chat`."""
    if not processor.chat_template:
        return
    asked = [{"role": "user", "content": [{"type": "text", "text": "1"}]}]
    own = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    problem = Problem(id="template", source="template", question="1", answer="1")
    try:
        ours = "".join(map(chat.token, chat.prompt(problem).ids))
    except PromptError:  # a limit below the system prompt's length; every real prompt will say so
        return
    if ours != own:
        log.warning("the model's chat template renders %r; rlcs trains and measures with %r", own, ours)


def save(vlm: Vlm, folder: Path) -> None:
    """Write a Hugging Face folder: weights (safetensors), configuration, processor; rank 0 does.

    Adapters are merged into the weights, and lie in peft's format in `folder/adapter` too; of a model in
    `reference_mode` they are left out.
    """
    weights = whole_weights(vlm.model, vlm.world) if vlm.fsdp_root is not None else None

    def write() -> None:
        if vlm.adapter is None:
            vlm.model.save_pretrained(folder, state_dict=weights)
        elif vlm.reference_mode:
            whole = weights or vlm.model.state_dict()
            adapters.merged(vlm.adapter, whole, reference_mode=True).save_pretrained(folder)
        else:
            adapters.save(vlm.adapter, folder, whole=weights)
        vlm.processor.save_pretrained(folder)
        open_to_readers(folder)

    vlm.world.first(write)


def save_adapters(vlm: Vlm, folder: Path) -> None:
    """Write the adapters of a model that has them, alone, in peft's format; rank 0 does."""
    adapter = vlm.adapter
    assert adapter is not None
    weights = whole_weights(vlm.model, vlm.world, having=".lora_") if vlm.fsdp_root is not None else None

    def write() -> None:
        adapters.save_alone(adapter, folder, whole=weights)
        open_to_readers(folder)

    vlm.world.first(write)
