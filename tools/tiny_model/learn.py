"""The lessons as trees, and the loop that learns them."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3_5ForConditionalGeneration

from rlcs.data.puzzles.family import Family
from rlcs.model import attention
from rlcs.model.families import FAMILIES
from rlcs.model.layout import dense_mask, layout_of
from tools.tiny_model.build import SYSTEM
from tools.tiny_model.lessons import Lesson, lessons

Model: TypeAlias = Qwen2_5_VLForConditionalGeneration | Qwen3_5ForConditionalGeneration


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What is learned together: families in turn (one named twice comes twice as often).

    `rate` is the peak learning rate, as a share of the usual one; `draw` makes the lessons of a seed.
    `packed`: lessons lie end to end in one row, which is faster where they differ in length.
    """

    families: tuple[Family, ...]
    rate: float = 1.0
    packed: bool = False
    draw: Callable[[tuple[Family, ...], int], Iterator[Lesson]] = lessons


@dataclass(frozen=True, slots=True)
class _Row:
    """One lesson as a tree: ids, kinds (1 at image tokens), targets (-100: no loss), positions (3, L).

    `sizes` are the lengths of its trunk and branches.
    """

    ids: list[int]
    kinds: list[int]
    targets: list[int]
    positions: Tensor
    sizes: tuple[int, list[int]]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Keywords of the model's forward, and the targets (B, L) of the tokens that go in (-100: no loss)."""

    inputs: dict[str, Any]
    targets: Tensor


class Collator:
    """Lays lessons out: system prompt and image as the trunk, every pair as a branch of its own.

    With `packed` they lie end to end in one row, whose tokens see each other by a plan, for which the model
    must be prepared (`Family.install`): for recurrent layers, which know no mask. Otherwise every lesson
    is a row of its own under a dense mask, through the model as it is.
    """

    def __init__(self, model: Model, processor: Any, *, packed: bool) -> None:
        self.model, self.processor, self.packed = model, processor, packed
        self.trunks: dict[tuple[str | None, tuple[int, ...]], tuple[list[int], list[int], Tensor]] = {}

    def __call__(self, chosen: Sequence[tuple[str | None, Lesson]]) -> _Batch:
        """A batch of (system prompt, lesson)."""
        images = [lesson.image for _, lesson in chosen if lesson.image is not None]
        seen = self.processor.image_processor(images, return_tensors="pt") if images else {}
        grids = iter(seen["image_grid_thw"] if images else ())
        rows = [self._row(system, lesson, next(grids) if lesson.image else None) for system, lesson in chosen]
        batch = _packed(rows) if self.packed else _padded(rows, self.processor.tokenizer.pad_token_id)
        of_images = {name: seen.get(name) for name in ("pixel_values", "image_grid_thw")}
        return _Batch(batch.inputs | of_images, batch.targets)

    def _row(self, system: str | None, lesson: Lesson, grid: Tensor | None) -> _Row:
        trunk, trunk_kinds, trunk_positions = self._trunk(system, grid)
        ids, targets, positions, lengths = list(trunk), [-100] * len(trunk), [trunk_positions], []
        start = int(trunk_positions.max()) + 1
        for question, response in lesson.pairs:
            question_ids = self._encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")
            response_ids = self._encode(f"{response}<|im_end|>")
            lengths.append(len(question_ids) + len(response_ids))
            ids += question_ids + response_ids
            targets += [-100] * len(question_ids) + response_ids
            positions.append(torch.arange(start, start + lengths[-1]).expand(3, -1))
        kinds = trunk_kinds + [0] * sum(lengths)
        return _Row(ids, kinds, targets, torch.cat(positions, dim=1), (len(trunk), lengths))

    def _trunk(self, system: str | None, grid: Tensor | None) -> tuple[list[int], list[int], Tensor]:
        """Ids, kinds and positions up to the image; there are few different ones, so they are kept."""
        key = (system, tuple(grid.tolist()) if grid is not None else ())
        if key not in self.trunks:
            text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
            text += "<|im_start|>user\n"
            if grid is not None:
                tokens = int(grid.prod()) // self.processor.image_processor.merge_size**2
                text += f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
            ids = self._encode(text)
            kinds = [int(i == self.model.config.image_token_id) for i in ids]
            positions, _ = self.model.model.get_rope_index(
                torch.tensor([ids]),
                torch.tensor([kinds]),
                image_grid_thw=grid[None] if grid is not None else None,
            )
            self.trunks[key] = (ids, kinds, positions[:, 0])
        return self.trunks[key]

    def _encode(self, text: str) -> list[int]:
        return list(self.processor.tokenizer.encode(text))


def _padded(rows: Sequence[_Row], pad: int) -> _Batch:
    """A row for each tree, padded on the right."""
    longest = max(len(row.ids) for row in rows)
    size = (len(rows), longest)
    ids = torch.full(size, pad)
    kinds, targets = torch.zeros(size, dtype=torch.long), torch.full(size, -100)
    positions = torch.zeros(3, *size, dtype=torch.long)
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], kinds[i, :n] = torch.tensor(row.ids), torch.tensor(row.kinds)
        targets[i, :n], positions[:, i, :n] = torch.tensor(row.targets), row.positions
        mask[i, 0, :n, :n] = dense_mask(layout_of([row.sizes]))
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds, "position_ids": positions}
    return _Batch(inputs | {"attention_mask": mask}, targets)


def _packed(rows: Sequence[_Row]) -> _Batch:
    """All trees end to end in one row. Every target follows a token of its own branch."""
    ids, kinds, targets = (
        [i for row in rows for i in getattr(row, of)] for of in ("ids", "kinds", "targets")
    )
    plan = attention.make_plan("auto", layout_of([row.sizes for row in rows]), torch.device("cpu"))
    inputs = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([kinds]), "plan": plan}
    positions = torch.cat([row.positions for row in rows], dim=1)[:, None]
    return _Batch(inputs | {"position_ids": positions}, torch.tensor([targets]))


def batch_loss(model: Model, batch: _Batch) -> Tensor:
    """Mean negative log-likelihood of response tokens; each is predicted by the token before it."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    targets = batch.targets[:, 1:]
    chosen = targets != -100
    logits = model.lm_head(hidden[:, :-1][chosen])
    loss: Tensor = torch.nn.functional.cross_entropy(logits.float(), targets[chosen])
    return loss


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for weight matrices (https://kellerjordan.github.io/posts/muon/).

    Here it learns to see in about half the steps that AdamW takes. torch's own runs in bfloat16,
    which is many times slower than float32 on most CPUs.
    """

    def __init__(
        self, matrices: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        """`lr` is the spectral norm of a step; the decay is decoupled, as in AdamW."""
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update with Nesterov momentum."""
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonal(matrix.grad.lerp(average, group["momentum"]))
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * scale)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns: five Newton-Schulz iterations."""
    x: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square: Tensor = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _optimizers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside both towers; AdamW for embeddings, the patch filter and vectors."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=0.02 * rate),
        torch.optim.AdamW(others, lr=2e-3 * rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def train(
    model: Model,
    processor: Any,
    *,
    seed: int,
    steps: int,
    course: Course,
    batch_size: int = 32,
    report: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Learn the lessons of one course on a cosine; returns the loss of every step.

    A quarter of the lessons come under what the chat template has for a system prompt when none is given.
    """
    rng = random.Random(f"systems|{seed}")
    stream = course.draw(course.families, seed)
    family = FAMILIES[model.config.model_type]
    packed = course.packed or "linear_attention" in model.config.text_config.layer_types
    collate = Collator(model, processor, packed=packed)
    if packed:
        family.install(model)
    optimizers = _optimizers(model, course.rate)
    warmup = max(1, steps // 20)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(_share, warmup, steps)) for o in optimizers]
    losses = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        systems = rng.choices((SYSTEM, family.default_system), (3, 1), k=batch_size)
        loss = batch_loss(model, collate(list(zip(systems, islice(stream, batch_size), strict=True))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            report(f"step {step + 1}/{steps}  loss {sum(losses[-50:]) / 50:.4f}  {seconds:.0f} s")
    model.set_attn_implementation("sdpa")
    return losses


def _share(warmup: int, steps: int, step: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
