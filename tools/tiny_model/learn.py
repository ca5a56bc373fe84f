"""The lessons as trees, and the loop that learns them."""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from rlcs.data.puzzles.family import Family
from rlcs.model.families.qwen2_vl import DEFAULT_SYSTEM
from rlcs.model.layout import dense_mask, layout_of
from tools.tiny_model.build import SYSTEM
from tools.tiny_model.lessons import Lesson, lessons


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What is learned together: families in turn (one named twice comes twice as often).

    `rate` is the peak learning rate, as a share of the usual one.
    """

    families: tuple[Family, ...]
    rate: float = 1.0


@dataclass(frozen=True, slots=True)
class _Row:
    """One lesson as a tree: ids, kinds (1 at image tokens), targets (-100: no loss), positions (3, L)."""

    ids: list[int]
    kinds: list[int]
    targets: list[int]
    positions: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """B rows padded to L: ids, kinds, targets (B, L), positions (3, B, L), mask (B, 1, L, L)."""

    ids: Tensor
    kinds: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    pixel_values: Tensor | None
    grids: Tensor | None


class Collator:
    """Lays lessons out: system prompt and image as the trunk, every pair as a branch of its own."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
        self.model, self.processor = model, processor
        self.trunks: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[int], Tensor]] = {}

    def __call__(self, chosen: Sequence[tuple[str, Lesson]]) -> _Batch:
        """A batch of (system prompt, lesson) rows, padded on the right."""
        images = [lesson.image for _, lesson in chosen if lesson.image is not None]
        seen = self.processor.image_processor(images, return_tensors="pt") if images else {}
        grids = iter(seen["image_grid_thw"] if images else ())
        rows = [self._row(system, lesson, next(grids) if lesson.image else None) for system, lesson in chosen]
        longest = max(len(row.ids) for row in rows)
        size = (len(rows), longest)
        ids = torch.full(size, self.processor.tokenizer.pad_token_id)
        kinds, targets = torch.zeros(size, dtype=torch.long), torch.full(size, -100)
        positions = torch.zeros(3, *size, dtype=torch.long)
        mask = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], kinds[i, :n] = torch.tensor(row.ids), torch.tensor(row.kinds)
            targets[i, :n], positions[:, i, :n] = torch.tensor(row.targets), row.positions
            mask[i, 0, :n, :n] = row.mask
        pixels, grid = seen.get("pixel_values"), seen.get("image_grid_thw")
        return _Batch(ids, kinds, targets, positions, mask, pixels, grid)

    def _row(self, system: str, lesson: Lesson, grid: Tensor | None) -> _Row:
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
        mask = dense_mask(layout_of([(len(trunk), lengths)]))
        return _Row(ids, trunk_kinds + [0] * sum(lengths), targets, torch.cat(positions, dim=1), mask)

    def _trunk(self, system: str, grid: Tensor | None) -> tuple[list[int], list[int], Tensor]:
        """Ids, kinds and positions up to the image; there are few different ones, so they are kept."""
        key = (system, tuple(grid.tolist()) if grid is not None else ())
        if key not in self.trunks:
            text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
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


def batch_loss(model: Qwen2_5_VLForConditionalGeneration, batch: _Batch) -> Tensor:
    """Mean negative log-likelihood of response tokens; each is predicted by the token before it."""
    hidden = model.model(
        input_ids=batch.ids,
        mm_token_type_ids=batch.kinds,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.grids,
        use_cache=False,
    ).last_hidden_state
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


def _optimizers(model: Qwen2_5_VLForConditionalGeneration, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside both towers; AdamW for embeddings, the patch filter and vectors."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=0.02 * rate),
        torch.optim.AdamW(others, lr=2e-3 * rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    *,
    seed: int,
    steps: int,
    course: Course,
    batch_size: int = 32,
    report: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Learn the lessons of one course on a cosine; returns the loss of every step."""
    rng = random.Random(f"systems|{seed}")
    stream = lessons(course.families, seed=seed)
    collate = Collator(model, processor)
    optimizers = _optimizers(model, course.rate)
    warmup = max(1, steps // 20)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(_share, warmup, steps)) for o in optimizers]
    losses = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        systems = rng.choices((SYSTEM, DEFAULT_SYSTEM), (3, 1), k=batch_size)
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
    return losses


def _share(warmup: int, steps: int, step: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
