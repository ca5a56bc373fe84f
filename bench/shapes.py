"""What is measured: shapes of work, and the model, problems and answer lengths of each.

Random models do not stop by themselves, so every answer's length is drawn here and forced on both
sides. Both load the same folder and see the same problems in the same order.
"""

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen3_5ForConditionalGeneration

from rlcs.data import puzzles
from rlcs.data.images import image_from_bytes
from rlcs.engines.local import LocalEngine
from rlcs.model import loading
from rlcs.model.bins import within_budget
from rlcs.model.chat import Chat
from rlcs.model.families import FAMILIES
from rlcs.model.images import ImagePipeline
from rlcs.model.patches import FlatPatches
from rlcs.recipe.schema import Model, Prompts
from rlcs.recipe.stages import Grpo
from rlcs.records import ImageRef, Problem
from tools import tiny_model
from tools.tiny_model import hybrid

SEED = 0
THREADS = 2
WARM_UP_TRUNK, WARM_UP_SIDE = 80, 112
"""The warm-up step has short prompts: it is there for lazy set-up and the optimiser's state."""
DECODE_LIMIT = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One shape of work."""

    name: str
    says: str
    """The shape in words."""
    trunk: int = 0
    """Tokens of a prompt; 0: the built-in tasks' own."""
    side: int = 0
    """Pixels along each side of its square images."""
    images: int = 1
    """Images of a prompt."""
    answers: tuple[int, int] = (0, 0)
    """Tokens of the shortest and the longest answer."""
    model: str
    prompts: int
    """Prompts a step."""
    group: int
    """Answers a prompt."""


HYBRID = "40M hybrid"
"""The name of the model of Qwen3.5's family."""


def _wide(
    name: str, *, model: str = "38M", group: int, trunk: int, side: int, answers: tuple[int, int]
) -> Shape:
    """A shape of one prompt a step on a wide model, which reads 28 x 28 pixels as a token."""
    image, (shortest, longest) = (side // 28) ** 2, answers
    lengths = f"{shortest}-{longest}" if shortest < longest else f"of {longest}"
    says = (
        f"{model} model; trunk {trunk} tokens, {image} of them image; answers {lengths}; "
        f"G = {group}; 1 prompt a step"
    )
    return Shape(
        name=name, says=says, model=model, prompts=1, group=group, trunk=trunk, side=side, answers=answers
    )


SHAPES = (
    _wide("wide image", group=8, trunk=320, side=448, answers=(40, 110)),
    _wide("long", group=10, trunk=600, side=224, answers=(150, 250)),
    Shape(
        name="built-in",
        says="the built-in model and tasks as in quickstart: trunks of about 53 tokens, answers of about 39; "
        "G = 8; 64 prompts a step",
        model="built-in",
        prompts=64,
        group=8,
    ),
    _wide("unfavourable", group=8, trunk=60, side=112, answers=(250, 350)),
    _wide("hybrid", model=HYBRID, group=8, trunk=320, side=448, answers=(75, 75)),
)
TRAINED = Shape(
    name="after a cold start",
    says="the built-in model after the quickstart's SFT; answers as long as it makes them; G = 8; "
    "64 prompts a step",
    model="trained",
    prompts=64,
    group=8,
)
"""Answers of a trained model begin alike, which rlcs decodes and learns from once; needs a folder of one."""
LONGEST_ANSWER = 96
"""Tokens of a trained model's answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A shape made concrete: `problems` in the order of training, answer `lengths` by problem id.

    `trunks` and `patches` are prompt tokens and image patches by problem id. `packs` is how many
    forward passes a step takes under the default token budget; the peer's batch is split as often.
    `cpu_time` (one thread) takes the place of wall time where other work disturbs the machine.
    """

    shape: Shape
    folder: str
    steps: int
    problems: tuple[Problem, ...]
    lengths: dict[str, tuple[int, ...]]
    trunks: dict[str, int]
    patches: dict[str, int]
    packs: int
    cpu_time: bool = False

    @property
    def threads(self) -> int:
        """Threads of each side."""
        return 1 if self.cpu_time else THREADS

    @property
    def ranks(self) -> int:
        """Processes that share our side on CPUs, as `pipeline.processes` would have it: by whole prompts."""
        return 1 if torch.cuda.is_available() else min(self.threads, self.shape.prompts)

    def step_problems(self, step: int) -> tuple[Problem, ...]:
        """The problems of one step (step 0 warms up)."""
        first = step * self.shape.prompts
        return self.problems[first : first + self.shape.prompts]

    def answer_tokens(self, step: int) -> int:
        """Tokens that one step samples and learns from."""
        return sum(sum(self.lengths[p.id]) for p in self.step_problems(step))

    @property
    def longest(self) -> int:
        """The longest answer of any step."""
        return max(max(each) for each in self.lengths.values())


def grpo_settings(case: Case) -> Grpo:
    """The GRPO choices of both sides: TRL's defaults, with a KL penalty so that there is a reference pass."""
    return Grpo.model_validate(
        {
            "optimizer": {
                "lr": 1e-6,
                "schedule": "constant",
                "warmup_steps": 0,
                "betas": (0.9, 0.999),
                "weight_decay": 0.0,
            },
            "prompts_per_step": case.shape.prompts,
            "group_size": case.shape.group,
            "max_new_tokens": case.longest,
            "max_rows": max(case.shape.prompts * case.shape.group, Grpo().max_rows),
            "clip_low": 0.2,
            "clip_high": 0.2,
            "clip_dual": None,
            "loss_average": "token",
            "kl": {"kind": "k3", "coefficient": 0.01},
        }
    )


def rewards(count: int) -> list[float]:
    """Fixed rewards of `count` answers: no group is flat, and no grader is measured."""
    return [float(i % 3 == 0) for i in range(count)]


def make_case(shape: Shape, folder: Path, steps: int, *, cpu_time: bool = False) -> Case:
    """Write a shape's model to `folder`; draw problems and lengths of one warm-up step and `steps` more."""
    family = "qwen3_5" if shape.model == HYBRID else "qwen2_5_vl"
    _, build_processor, build_model = tiny_model.FAMILIES[family]
    processor = build_processor(tiny_model.corpus(1200 if shape.model == "built-in" else 100))
    wide: dict[str, Callable[[Any], PreTrainedModel]] = {"38M": wide_model, HYBRID: wide_hybrid}
    model = wide.get(shape.model, build_model)(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    images = ImagePipeline(FlatPatches(processor.image_processor), decode_limit=DECODE_LIMIT)
    chat = Chat(
        processor.tokenizer,
        images,
        family=FAMILIES[family],
        system=Prompts().system,
        max_tokens=4096,
        default_system=None,
    )
    count = shape.prompts * (1 + steps)
    problems = drawn_problems(shape, chat, count) if shape.trunk else _own_problems(count)
    lengths = {p.id: _lengths(shape, chat, p) for p in problems}
    for problem in problems[: shape.prompts]:
        lengths[problem.id] = tuple(max(2, n // 4) for n in lengths[problem.id])
    return _case(shape, str(folder), chat, problems, lengths, cpu_time=cpu_time)


def trained_case(shape: Shape, model: str, steps: int, *, cpu_time: bool = False) -> Case:
    """A shape with the trained model of a folder: answers are as long as it makes them with SEED."""
    vlm = loading.load(Model(name=model, dtype="float32"), device=loading.default_device())
    chat = loading.make_chat(vlm)
    engine = LocalEngine(vlm, chat, max_rows=shape.prompts * shape.group)
    sampling = chat.sampling(n=shape.group, temperature=1.0, max_new_tokens=LONGEST_ANSWER, seed=SEED)
    problems = _own_problems(shape.prompts * (1 + steps))
    lengths: dict[str, tuple[int, ...]] = {}
    for step in range(1 + steps):
        own = problems[step * shape.prompts : (step + 1) * shape.prompts]
        groups = engine.sample([chat.prompt(problem) for problem in own], sampling, step=step)
        lengths |= {p.id: tuple(len(r.ids) for r in g) for p, g in zip(own, groups, strict=True)}
    return _case(shape, str(loading.resolve(model)), chat, problems, lengths, cpu_time=cpu_time)


def _case(
    shape: Shape,
    folder: str,
    chat: Chat,
    problems: Sequence[Problem],
    lengths: dict[str, tuple[int, ...]],
    *,
    cpu_time: bool,
) -> Case:
    prompts = {p.id: chat.prompt(p) for p in problems}
    trunks = {name: len(prompt.ids) for name, prompt in prompts.items()}
    patches = {name: sum(t * h * w for t, h, w in prompt.grids) for name, prompt in prompts.items()}
    sizes = [trunks[p.id] + sum(lengths[p.id]) for p in problems[-shape.prompts :]]
    return Case(
        shape=shape,
        folder=folder,
        steps=len(problems) // shape.prompts,
        problems=tuple(problems),
        lengths=lengths,
        trunks=trunks,
        patches=patches,
        cpu_time=cpu_time,
        packs=_even_share(shape, len(within_budget(sizes, Grpo().pack_tokens))),
    )


def _even_share(shape: Shape, packs: int) -> int:
    """The smallest number of equal batches, at least `packs`: the peer takes no uneven ones."""
    answers = shape.prompts * shape.group
    return next(count for count in range(packs, answers + 1) if answers % count == 0)


def wide_model(processor: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 38M parameters with random weights, for the tokenizer of the built-in model."""
    text = {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 960,
        "num_heads": 4,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [3, 7],
        "window_size": 112,
    }
    return tiny_model.random_model(processor.tokenizer, text, vision, seed=SEED)


def wide_hybrid(processor: Any) -> Qwen3_5ForConditionalGeneration:
    """A Qwen3.5 as wide and as deep: two of eight layers attend, the others are gated delta nets."""
    text = {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    }
    vision = {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 960,
        "num_heads": 4,
        "out_hidden_size": 512,
        "patch_size": 14,
    }
    return hybrid.random_model(processor.tokenizer, text, vision, seed=SEED)


def drawn_problems(shape: Shape, chat: Chat, count: int) -> list[Problem]:
    """Problems whose prompts have exactly `shape.trunk` tokens: every digit is one token."""
    problems = []
    for index in range(count):
        rng = random.Random(f"{SEED}|{shape.name}|{index}")
        warm_up = index < shape.prompts
        trunk = min(shape.trunk, WARM_UP_TRUNK) if warm_up else shape.trunk
        side = min(shape.side, WARM_UP_SIDE) if warm_up else shape.side
        images = tuple(drawn_image(side, rng) for _ in range(1 if warm_up else shape.images))
        bare = len(chat.prompt(_problem(index, "0", images)).ids) - 1
        digits = "".join(rng.choice("0123456789") for _ in range(trunk - bare))
        problem = _problem(index, digits, images)
        assert len(chat.prompt(problem).ids) == trunk, "one token a digit"
        problems.append(problem)
    return problems


def _problem(index: int, question: str, images: tuple[ImageRef, ...]) -> Problem:
    return Problem(id=f"bench-{index}", source="bench", question=question, answer="1", images=images)


def drawn_image(side: int, rng: random.Random) -> ImageRef:
    """A square image of coloured rectangles, `side` pixels wide, held in memory as PNG."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = rng.randrange(side), rng.randrange(side), rng.randrange(side // 8, side // 2)
        pen.rectangle((x, y, x + size, y + size), fill=tuple(rng.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image_from_bytes(buffer.getvalue(), limit=DECODE_LIMIT, where="bench")


def _own_problems(count: int) -> list[Problem]:
    return list(puzzles.load("puzzles", split="train", count=count, seed=2, levels=(1, 2)))


def _lengths(shape: Shape, chat: Chat, problem: Problem) -> tuple[int, ...]:
    """Lengths of a group's answers, end token included; the built-in tasks': as long as the teacher's."""
    if not shape.trunk:
        texts = [puzzles.teach(problem, seed=i, wrong_share=0.25) for i in range(shape.group)]
        return tuple(len(chat.response_ids(text)) for text in texts)
    rng = random.Random(f"{SEED}|lengths|{problem.id}")
    return tuple(rng.randint(*shape.answers) for _ in range(shape.group))
