"""One optimiser step: forward, backward, global denominator, clip, check for finite gradients, AdamW.

Both stages use it. An objective returns the sums of one pack; the trainer alone divides them, by a
denominator of the whole step, so that a loss does not depend on how trees were split over packs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlcs.errors import TrainingError
from rlcs.model.copies import mean_gradients
from rlcs.model.packing import Pack
from rlcs.model.policy import Scores, score
from rlcs.model.vlm import Vlm
from rlcs.recipe.stages import Optimizer as OptimizerSettings
from rlcs.records import NOT_FINITE
from rlcs.records.trees import Tree
from rlcs.train.losses import Average, LossSums, denominator


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A pack, with the old, reference and teacher's logprobs (N,) where its objective needs them."""

    pack: Pack
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None


Objective = Callable[[Batch, Scores], LossSums]
"""The loss of one batch, as sums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroGradCounts:
    """Tokens and sequences that enter a step's denominator although their gradient is known to be zero."""

    tokens: int = 0
    sequences: int = 0

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> "ZeroGradCounts":
        """The counts of trees that are not computed."""
        branches = [branch for tree in trees for branch in tree.branches]
        return cls(tokens=sum(len(branch.ids) for branch in branches), sequences=len(branches))

    def __add__(self, other: "ZeroGradCounts") -> "ZeroGradCounts":
        """The counts of both."""
        return ZeroGradCounts(tokens=self.tokens + other.tokens, sequences=self.sequences + other.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The outcome of one optimiser step; `values` are averages over its tokens, `skipped` is a reason."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    targets: int
    values: dict[str, float] = field(default_factory=dict)
    skipped: str = ""


def combined(results: Sequence[StepResult]) -> StepResult:
    """One result for the optimiser steps of one rollout step (at least one).

    Tokens add up; the loss and `values` are means, the gradient norm and values whose names end in `_max`
    are maxima; the rate is the last. `sampler_gap` and its maximum are the first step's: in later steps the
    policy has been trained meanwhile. `skipped` is the reason of the first step that was skipped.
    """
    first, values = results[0], {}
    for name in dict.fromkeys(name for result in results for name in result.values):
        of_steps = [result.values[name] for result in results if name in result.values]
        values[name] = max(of_steps) if name.endswith("_max") else sum(of_steps) / len(of_steps)
    values |= {name: first.values[name] for name in ("sampler_gap", "sampler_gap_max") if name in values}
    return StepResult(
        loss=sum(result.loss for result in results) / len(results),
        grad_norm=max(result.grad_norm for result in results),
        lr=results[-1].lr,
        tokens=sum(result.tokens for result in results),
        targets=sum(result.targets for result in results),
        values=values,
        skipped=next((result.skipped for result in results if result.skipped), ""),
    )


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The rate of optimiser step `step` (from 0) of `steps`: linear warm-up, then cosine or constant."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(vlm: Vlm, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and norms are not decayed."""
    parameters = [p for _, p in vlm.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


MOST_LOST = 0.25
"""The largest share of a stage's steps that may have no finite gradient."""
_LOWER_RATE = "lower the learning rate; the last checkpoint is intact"


class Trainer:
    """Trains a model: holds its optimiser and counts the steps."""

    def __init__(self, vlm: Vlm, settings: OptimizerSettings, *, steps: int, max_bad_steps: int) -> None:
        """`steps` is the length of the schedule; after `max_bad_steps` in a row training ends.

        `bad_steps` counts those without a finite gradient in a row, `lost_steps` all of them.
        """
        self.vlm = vlm
        self.optimizer = make_optimizer(vlm, settings)
        self.done = 0
        self.bad_steps = self.lost_steps = 0
        self._settings = settings
        self._steps = steps
        self._max_bad_steps = max_bad_steps
        self._parameters = [p for _, p in vlm.parameters()]
        self._step: _StepSums | None = None

    def step(
        self,
        batches: Sequence[Batch],
        objective: Objective,
        *,
        average: Average,
        temperature: float = 1.0,
        max_new_tokens: int = 1,
        zero_grad: ZeroGradCounts = ZeroGradCounts(),
    ) -> StepResult:
        """Take one optimiser step over all `batches`: `add` each, then `apply`."""
        for batch in batches:
            self.add(batch, objective, temperature=temperature)
        return self.apply(average=average, max_new_tokens=max_new_tokens, zero_grad=zero_grad)

    def add(
        self,
        batch: Batch,
        objective: Objective,
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> None:
        """Add the gradient of one batch to the step under way, or begin a step with it.

        Every rank adds equally many batches, in step (see `train.batching`). Nothing here waits for the
        device: what is reported stays there until `apply`. With `entropy_gradient` the objective gets
        entropies that have one.
        """
        if self._step is None:
            self.optimizer.zero_grad(set_to_none=True)
            self._step = _StepSums()
        self.vlm.model.train()
        scores = score(self.vlm, batch.pack, temperature=temperature, entropy_gradient=entropy_gradient)
        sums = objective(batch, scores)
        sums.loss.backward()
        self._step.add(batch.pack, scores, sums)

    def apply(
        self, *, average: Average, max_new_tokens: int = 1, zero_grad: ZeroGradCounts = ZeroGradCounts()
    ) -> StepResult:
        """End the step: divide the sums of all ranks once, clip, and change the weights.

        So batches may come in any order and at any time, as long as no weight changes between them. The
        result and `zero_grad` are of all ranks together. A step whose gradient norm is not finite (which a
        finite loss may have) changes no weight, and its result has the reason; after too many such steps
        this raises TrainingError.
        """
        assert self._step is not None, "a step has at least one batch"
        counts, totals, means = map(self.vlm.world.sum, self._step.read())
        self._step = None
        divisor = denominator(
            average,
            tokens=int(counts["tokens"]) + zero_grad.tokens,
            sequences=int(counts["sequences"]) + zero_grad.sequences,
            packs=int(counts["packs"]),
            max_new_tokens=max_new_tokens,
        )
        targets = int(counts["targets"])
        norm, skipped = self._apply(divisor)
        lr = learning_rate(self._settings, self.done, self._steps)
        self.done += 1
        return StepResult(
            loss=counts["loss"] / divisor,
            grad_norm=norm,
            lr=lr,
            tokens=int(counts["passed"]),
            targets=targets,
            values=means | {k: v if k.endswith("_max") else v / max(1, targets) for k, v in totals.items()},
            skipped=skipped,
        )

    def _apply(self, divisor: float) -> tuple[float, str]:
        """Divide and clip the gradients, step if they are finite; the norm, and why a step was skipped."""
        if self.vlm.fsdp_root is None:
            mean_gradients(self._parameters, self.vlm.world)
        grads = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_div_(grads, divisor / self.vlm.world.size)  # they are the mean over ranks, also FSDP's
        total = torch.nn.utils.get_total_norm(grads)
        total = total.full_tensor() if isinstance(total, DTensor) else total
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._settings.max_grad_norm, total)
        norm = total.item()
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            self.bad_steps += 1
            self.lost_steps += 1
            if self.bad_steps >= self._max_bad_steps:
                what = f"the gradient was not finite in {self.bad_steps} steps in a row"
                raise TrainingError(what, fix=_LOWER_RATE)
            if self.lost_steps >= self._max_bad_steps:
                self.require_finite(self.done + 1)
            return 0.0, NOT_FINITE
        self.bad_steps = 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self.done, self._steps)
        self.optimizer.step()
        return norm, ""

    def require_finite(self, steps: int) -> None:
        """Raise TrainingError where more than a quarter of so many steps had no finite gradient."""
        if self.lost_steps > MOST_LOST * steps:
            what = f"the gradient was not finite in {self.lost_steps:,} of {steps:,} steps"
            raise TrainingError(what, fix=_LOWER_RATE)


class _StepSums:
    """The counts and sums of one optimiser step on this rank; those on the device stay there until `read`."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(("loss", "tokens", "sequences", "packs", "targets", "passed"), 0.0)
        self._totals: dict[str, float] = defaultdict(float)
        self._means: dict[str, float] = defaultdict(float)
        self._unread: list[tuple[Callable[[str, float], None], str, Tensor]] = []

    def add(self, pack: Pack, scores: Scores, sums: LossSums) -> None:
        """Take up one pack, without waiting for its numbers."""
        # A head that trees share counts in each, and padding trees in none: how they are packed does not.
        self._count("passed", pack.tree_tokens)
        if sums.extra:
            self._unread.append((self._count, "loss", sums.loss.detach()))
            self._unread += [(self._mean, name, value) for name, value in sums.sums.items()]
            return
        self._count("packs", pack.num_targets > 0)
        self._count("targets", pack.num_targets)
        counts = {"loss": sums.loss.detach(), "tokens": sums.tokens, "sequences": sums.sequences}
        self._unread += [(self._count, name, value) for name, value in counts.items()]
        self._unread += [(self._total, name, value) for name, value in sums.sums.items()]
        self._unread += [(self._largest, name, value) for name, value in sums.maxima.items()]
        self._unread.append((self._total, "entropy", scores.entropy.detach().sum()))

    def read(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """The counts with the loss, totals and means for the report, in one transfer from the device.

        They are added up here, in the order of the packs, so that the sums do not depend on the device.
        """
        values = torch.stack([value.double() for _, _, value in self._unread]).tolist()
        for (add, name, _), value in zip(self._unread, values, strict=True):
            add(name, value)
        return self._counts, self._totals, self._means

    def _count(self, name: str, value: float) -> None:
        self._counts[name] += value

    def _total(self, name: str, value: float) -> None:
        self._totals[name] += value

    def _mean(self, name: str, value: float) -> None:
        self._means[name] += value

    def _largest(self, name: str, value: float) -> None:
        self._totals[name] = max(self._totals[name], value)


@torch.no_grad()
def logprobs_of(vlm: Vlm, packs: Sequence[Pack], *, temperature: float) -> list[Tensor]:
    """Logprobs (N,) of every pack without gradients: the old or the reference pass."""
    vlm.model.eval()
    with vlm.scoring():
        return [score(vlm, pack, temperature=temperature).logprobs for pack in packs]
