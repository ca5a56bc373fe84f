"""Random models with the layer shapes of published ones, and trees of random answers about drawn images.

Tokenizer and processor are the built-in model's, so that nothing is loaded from a network. Depth and
vocabulary are chosen; all other sizes are the published ones.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from rlcs.data.images import encode, image_from_bytes
from rlcs.distributed import ALONE, World
from rlcs.doctor.gpu import Setting
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.plan.shapes import Sizes
from rlcs.plan.skeleton import published
from rlcs.plan.work import language, vision
from rlcs.recipe.schema import Images, Model, Prompts
from rlcs.records import ImageRef, Problem
from rlcs.records.trees import Branch, Tree
from rlcs.storage import read_json

TEXT_IDS = range(20, 480)
"""Ids of the built-in vocabulary that are text."""
_SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_DEPTH = ("layer_types", "num_hidden_layers", "depth", "fullatt_block_indexes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's layers: a published name (or `builtin`), depth of both parts, vocabulary (0: small)."""

    name: str
    layers: int = 2
    blocks: int = 2
    vocabulary: int = 0

    @property
    def label(self) -> str:
        """A short name: `3B`."""
        return self.name.removeprefix("Qwen/Qwen2.5-VL-").removesuffix("-Instruct")


def shapes(setting: Setting) -> tuple[Shape, ...]:
    """The models whose layers are checked: those of 3B and of 7B, or small ones on a CPU."""
    if setting.cpu:
        return (Shape(name="builtin"),)
    return tuple(Shape(name=f"Qwen/Qwen2.5-VL-{size}-Instruct", blocks=4) for size in ("3B", "7B"))


def configuration(shape: Shape) -> Qwen2_5_VLConfig:
    """The configuration of a random model: every second vision block attends to the whole image."""
    builtin = read_json(Path(loading.resolve("builtin")) / "config.json")
    known = published(shape.name)
    values: dict[str, Any] = copy.deepcopy(builtin) if known is None else known.to_dict()
    text, tower = values["text_config"], values["vision_config"]
    for part in (text, tower):
        for key in _DEPTH:
            part.pop(key, None)
    text |= {key: builtin["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"num_hidden_layers": shape.layers}
    text |= {"vocab_size": shape.vocabulary or builtin["text_config"]["vocab_size"]}
    tower |= {"depth": shape.blocks, "fullatt_block_indexes": list(range(1, shape.blocks, 2))}
    values |= {key: builtin[key] for key in _SPECIAL}
    return Qwen2_5_VLConfig(**values)


def random_vlm(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    checkpointing: bool = False,
    world: World = ALONE,
) -> Vlm:
    """A model with random weights, the same for a seed on every rank."""
    described = loading.load(Model(name="builtin"), device=device, weights=False)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(configuration(shape), dtype=dtype)
    described.family.install(model)
    if checkpointing:
        loading.checkpoint_activations(model)
    return replace(described, model=model.eval(), world=world)


def make_chat(vlm: Vlm, *, max_tokens: int = 1 << 15) -> Chat:
    """The chat format of a random model, for long prompts and large images."""
    images = Images(min_pixels=56 * 56, max_pixels=1_204_224)
    return loading.make_chat(vlm, Prompts(max_tokens=max_tokens), images)


def drawn(width: int, height: int, seed: int, *, kind: str = "PNG") -> ImageRef:
    """An image of random coloured tiles, encoded in this way."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (max(1, height // 28), max(1, width // 28), 3), generator=generator)
    image = Image.fromarray(tiles.to(torch.uint8).numpy()).resize((width, height), Image.Resampling.NEAREST)
    return image_from_bytes(encode(image, kind), limit=1 << 24, where="drawn")


def random_tree(
    chat: Chat, sides: Sequence[tuple[int, int]], answers: Sequence[int], *, text: int = 40, seed: int = 0
) -> Tree:
    """A tree of random answers of these lengths, to a prompt with images of these sizes and random text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 26, (text,), generator=generator).tolist()
    problem = Problem(
        id=f"random-{seed}",
        source="random",
        question=" ".join(chr(ord("a") + word) for word in words),
        answer="1",
        images=tuple(drawn(width, height, 1000 * seed + i) for i, (width, height) in enumerate(sides)),
    )
    branches = []
    for index, length in enumerate(answers):
        ids = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (length,), generator=generator).tolist()
        sign = 1.0 if index % 2 else -1.0
        branches.append(Branch(ids=tuple(ids), weights=(sign,) * length, logprobs=(-1.0,) * length))
    return Tree(prompt=chat.prompt(problem), branches=tuple(branches))


def operations(sizes: Sizes, trees: Sequence[Tree]) -> dict[str, float]:
    """Operations of one forward pass over trees, of the language model and of the vision tower."""
    work = {"language": 0.0, "vision": 0.0}
    for tree in trees:
        answers = [len(branch.ids) for branch in tree.branches]
        work["language"] += language(sizes, len(tree.prompt.ids), answers)
        patches = [frames * height * width for frames, height, width in tree.prompt.grids]
        work["vision"] += sum(vision(sizes.vision, count) for count in patches)
    return work
