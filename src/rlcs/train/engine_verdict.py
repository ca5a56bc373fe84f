"""Judges whether an engine saw and computed what the trainer does, and names the first layer that is wrong.

Letters in shapes: N answer tokens, K candidates for each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from rlcs.engines.base import EngineView, Seen
from rlcs.errors import TrainingError
from rlcs.records import Prompt
from rlcs.train.engine_faults import ROUNDING, Computed, Fault, Layer

FACTOR = 4.0
"""Engine and trainer may differ this many times as much as the trainer under another kernel's rounding."""
SMALLEST_LIMIT = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.02, "fp8": 0.1}
"""A mean difference (nats a token) that is accepted in any case unless a known fault explains it."""
FEW_TOKENS = 4.0
"""For n tokens 1 + this / sqrt(n) times as much is allowed: rounding falls on few tokens (`parity_check`)."""
MEASURABLE = 1e-4
"""A mean difference below this (nats a token) is not looked into."""
EXPLAINED, SURE = 0.5, 0.9
"""A fault is found where it explains this share of the squared differences, and what is left is allowed: the
differences of a healthy engine have no direction in common with the effect of a fault, and with hundreds of
candidates none by chance. From the second share on something may be left."""
KERNEL = 2.0
"""Text that is apart by up to so many times the limit, or what bfloat16 would do, is blamed on a kernel,
and beyond that on weights."""
PART = 2.0
"""Where there is a fault, tokens have a part in it that are apart by so many times the effect of rounding."""
UNMOVED = 0.1
"""An image does not reach the engine where swapping it changes less than this share of what it should."""

Kind = Literal["with its image", "with another image in its place", "without its image"]
IMAGE: Kind = "with its image"
SWAPPED: Kind = "with another image in its place"
TEXT: Kind = "without its image"

FIXES: dict[Layer, str] = {
    "ids": "serve the folder that rlcs saved, so that tokenizer and special tokens are the run's",
    "grid": "the engine's image processor must have this run's pixel bounds: serve a folder that rlcs saved, "
    "without --mm-processor-kwargs",
    "pixels": "compare preprocessor_config.json of the served folder with the run's, take "
    "--mm-processor-kwargs out, and try --mm-processor-cache-gb 0",
    "positions": "the engine counts positions of this family's images in another way: take --hf-overrides "
    "out, or use another version of vLLM",
    "weights": "see the engine's log; try rollout.weights=folder (with adapters rollout.lora=merged), and "
    "restart servers that run elsewhere",
    "kernel": "try rollout.arguments=[--enforce-eager] or another --attention-backend; a server that rounds "
    "weights needs rollout.quantization",
}
OFF = "rollout.checks=0 goes on without this comparison"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A prompt that is compared, of one of three kinds."""

    prompt: Prompt
    kind: Kind

    @property
    def name(self) -> str:
        """The prompt in messages."""
        return f"prompt {self.prompt.problem_id} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one instance to all cases: candidates' ids and logprobs (N, K), and their cases (N,).

    `shares` (N, K) are the candidates' probabilities, 1 in sum for each token.
    """

    view: EngineView
    ids: Tensor
    logprobs: Tensor
    shares: Tensor
    case: Tensor
    is_first: Tensor

    @classmethod
    def of(cls, view: EngineView) -> "Answers":
        """The answers in a view; tokens with fewer candidates are padded with a share of zero."""
        tokens = [(i, n, row) for i, seen in enumerate(view.prompts) for n, row in enumerate(seen.candidates)]
        width = max(len(row) for _, _, row in tokens)
        padded = [(*row, *[(row[0][0], -math.inf)] * (width - len(row))) for _, _, row in tokens]
        logprobs = torch.tensor([[logprob for _, logprob in row] for row in padded])
        return cls(
            view=view,
            ids=torch.tensor([[index for index, _ in row] for row in padded]),
            logprobs=logprobs.clamp(min=-1e4),
            shares=logprobs.softmax(1),
            case=torch.tensor([i for i, _, _ in tokens]),
            is_first=torch.tensor([n == 0 for _, n, _ in tokens]),
        )

    def differences(self, computed: Computed) -> Tensor:
        """Engine less trainer (N, K). The engine's logprobs may be with or without ids that are banned."""
        apart = self.logprobs - computed.logprobs
        gained = computed.banned[:, None].expand_as(apart)
        return torch.where(self.shares > 0, apart - torch.minimum(apart.clamp(min=0), gained), 0.0)

    def gap(self, computed: Computed, tokens: Tensor) -> float:
        """The mean difference (nats) in place of some tokens (N,), weighted by probability; 0 without any."""
        sizes = (self.shares * self.differences(computed).abs()).sum(1)[tokens]
        if not sizes.numel():
            return 0.0
        return float(sizes.mean()) if sizes.isfinite().all() else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """How far one case of an instance is from the trainer, and how far it may be (nats a token)."""

    name: str
    gap: float
    limit: float
    precision: str

    @property
    def share(self) -> float:
        """The gap as a share of what is allowed; above 1 is a fault."""
        return self.gap / self.limit


def require_same_prompts(view: EngineView, cases: Sequence[Case]) -> None:
    """Raise TrainingError where an instance read other ids, or images as other numbers of tokens."""
    for seen, case in zip(view.prompts, cases, strict=True):
        theirs, ours, image = seen.prompt_ids, case.prompt.ids, case.prompt.image_token_id
        if theirs == ours:
            continue
        text, own_text = ([i for i in ids if i != image] for ids in (theirs, ours))
        if text != own_text:
            at = next((n for n, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), -1)
            evidence = (
                f"it read {len(theirs)} ids and not {len(ours)}, other ones from number {max(at, 0)} on"
            )
            raise _fault(view, "ids", f"{case.name}: {evidence}")
        sizes, own_sizes = (_runs(ids, image) for ids in (theirs, ours))
        evidence = f"it made {_listed(sizes)} tokens of the images, and the trainer {_listed(own_sizes)}"
        raise _fault(view, "grid", f"{case.name}: {evidence}")


def _runs(ids: Sequence[int], image: int) -> list[int]:
    return [len(list(run)) for is_image, run in groupby(ids, lambda i: i == image) if is_image]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) or "no"


def _fault(view: EngineView, layer: Layer, evidence: str) -> TrainingError:
    return TrainingError(
        f"the rollout engine does not compute what the trainer does; wrong first: {layer}. {evidence}",
        where=view.name,
        fix=f"{FIXES[layer]}; {OFF}",
    )


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One engine instance beside the trainer; `rounding` (N, K) is by how much another kernel may differ."""

    cases: Sequence[Case]
    answers: Answers
    truth: Computed
    rounding: Tensor
    precision: str

    @cached_property
    def compared(self) -> list[Compared]:
        """Every case with its difference and its limit."""
        return [self._case(index) for index in range(len(self.cases))]

    @property
    def worst(self) -> Compared:
        """The case that takes most of what it is allowed."""
        return max(self.compared, key=lambda each: each.share)

    def _case(self, index: int) -> Compared:
        own = self.answers.case == index
        return Compared(
            name=self.cases[index].name,
            gap=self.answers.gap(self.truth, own),
            limit=self._limit(own),
            precision=self.precision,
        )

    def _noise(self, tokens: Tensor) -> float:
        """The mean effect of rounding (nats a token) on some tokens, or on all if that is more."""
        noise = (self.answers.shares * self.rounding).sum(1)
        return max(float(noise.mean()), float(noise[tokens].mean()) if tokens.any() else 0.0)

    def _limit(self, tokens: Tensor) -> float:
        measured = self._noise(tokens)
        limit = max(SMALLEST_LIMIT[self.precision], FACTOR * measured)
        return limit * (1 + FEW_TOKENS / math.sqrt(max(1, int(tokens.sum()))))

    def require_health(self, assumed: Sequence[tuple[Fault, Computed]]) -> None:
        """Raise TrainingError where the instance differs from the trainer by more than rounding."""
        if self.worst.gap <= MEASURABLE:
            return
        everything = torch.ones_like(self.answers.is_first)
        found = [(self._explained(computed), fault, computed) for fault, computed in assumed]
        found = [
            one
            for one in found
            if one[0] >= SURE
            or (one[0] >= EXPLAINED and self.answers.gap(one[2], everything) <= self._limit(everything))
        ]
        if found:
            _, fault, computed = max(found, key=lambda one: one[0])
            left = self.answers.gap(computed, everything)
            evidence = f"its numbers are as if {fault.text}: with that the trainer is {left:.2g} nats apart"
            raise _fault(self.answers.view, fault.layer, f"{self._differences()}; {evidence}")
        if self.worst.share > 1:
            layer, evidence = self._unexplained()
            raise _fault(self.answers.view, layer, f"{self._differences()}; {evidence}")

    def _explained(self, instead: Computed) -> float:
        """The share of squared differences that is gone where the trainer computes something else.

        Of all cases together, or of the median case where that is less: not by a few tokens of one answer.
        """
        before, after = (
            torch.zeros(len(self.cases)).index_add(
                0, self.answers.case, (self.answers.shares * self.answers.differences(each).square()).sum(1)
            )
            for each in (self.truth, instead)
        )
        changed = before != after
        if not changed.any() or not after.isfinite().all():
            return 0.0
        gone = 1 - after / before
        return min(float(1 - after.sum() / before.sum()), float(gone[changed].median()))

    def _of(self, *kinds: Kind) -> Tensor:
        """The tokens (N,) of cases of these kinds."""
        return torch.tensor([case.kind in kinds for case in self.cases])[self.answers.case]

    def _is_off(self, tokens: Tensor) -> bool:
        """Whether these tokens have a part in a fault that was found."""
        return self.answers.gap(self.truth, tokens) > max(10 * MEASURABLE, PART * self._noise(tokens))

    def _begins_right(self, *kinds: Kind) -> bool:
        """Whether candidates for the first token, all with the same weight, differ by rounding alone."""
        tokens = self._of(*kinds) & self.answers.is_first
        apart = float(self.answers.differences(self.truth)[tokens].abs().mean())
        return apart <= max(MEASURABLE, PART * float(self.rounding[tokens].mean()))

    def _differences(self) -> str:
        """The measured differences in words."""
        kinds = [kind for kind in (IMAGE, SWAPPED, TEXT) if self._of(kind).any()]
        gaps = ", ".join(f"{kind} {self.answers.gap(self.truth, self._of(kind)):.2g}" for kind in kinds)
        worst = self.worst
        allowed = "allowed are" if worst.share > 1 else "where rounding might do"
        return (
            f"{worst.name} is {worst.gap:.2g} nats a token from the trainer, {allowed} {worst.limit:.2g} "
            f"({worst.precision}); all prompts {gaps}"
        )

    def _unexplained(self) -> tuple[Layer, str]:
        """The layer of a fault that no hypothesis explains, and why it is that one."""
        text = self._of(TEXT)
        if text.any() and self._is_off(text):
            if self._begins_right(IMAGE, SWAPPED, TEXT):
                return "kernel", "first tokens agree, also unlikely ones, and later ones do not: decoding"
            apart, own = self.answers.gap(self.truth, text), ROUNDING[self.precision]
            rounded = self._noise(text) * max(1.0, ROUNDING["bfloat16"] / own)
            if apart <= KERNEL * max(self._limit(text), rounded):
                return "kernel", "text differs too, and by no more than a lower precision would explain"
            return "weights", f"text differs too, by {apart / self._limit(text):.2g} times what is allowed"
        theirs, ours = self.swap_effects()
        effects = (
            f"another image changes the first token by {ours:.2g} nats in the trainer, by {theirs:.2g} here"
        )
        if theirs < UNMOVED * ours:
            return "pixels", f"text agrees, and {effects}"
        if self._begins_right(IMAGE, SWAPPED):
            return "positions", "text agrees, and with an image the first token does: only later ones are off"
        return "pixels", f"text agrees, and {effects}: the image arrives, but not as it is"

    def swap_effects(self) -> tuple[float, float]:
        """How far another image moves the first token's logprobs, in the engine and in the trainer."""
        effects = []
        for index, case in enumerate(self.cases):
            if case.kind != IMAGE:
                continue
            one, other = (self._first(index), self._first(index + 1))
            common = [i for i in one if i in other]
            moved = [(abs(one[i][0] - other[i][0]), abs(one[i][1] - other[i][1])) for i in common]
            # Without a candidate in common the image has changed all of them.
            effects.append([sum(each) / len(moved) for each in zip(*moved, strict=True)] or [1.0, 1.0])
        if not effects:
            return 0.0, 0.0
        theirs, ours = (sum(each) / len(effects) for each in zip(*effects, strict=True))
        return theirs, ours

    def _first(self, index: int) -> dict[int, tuple[float, float]]:
        """For the first token of a case: each candidate's logprob by the engine and by the trainer."""
        [row] = torch.nonzero((self.answers.case == index) & self.answers.is_first)[0].tolist()
        found = zip(
            self.answers.ids[row].tolist(),
            self.answers.logprobs[row].tolist(),
            self.truth.logprobs[row].tolist(),
            strict=True,
        )
        return {i: (theirs, ours) for i, theirs, ours in found if theirs > -1e4}


def older(now: Instance, answers: Answers, truth: Computed) -> Computed:
    """What the trainer computed for the engine's answers of an earlier comparison, where they are the same.

    An answer is followed as long as its tokens are those of before; the rest is as now.
    """
    logprobs = now.truth.logprobs.clone()
    for index, (new, old) in enumerate(zip(now.answers.view.prompts, answers.view.prompts, strict=True)):
        rows, old_rows = (torch.nonzero(a.case == index)[:, 0].tolist() for a in (now.answers, answers))
        for place in range(_common(new, old)):
            at, was = rows[place], old_rows[place]
            known = dict(zip(answers.ids[was].tolist(), truth.logprobs[was].tolist(), strict=True))
            for column, i in enumerate(now.answers.ids[at].tolist()):
                logprobs[at, column] = known.get(i, float(logprobs[at, column]))
    return Computed(logprobs=logprobs, banned=now.truth.banned)


def _common(new: Seen, old: Seen) -> int:
    """Places of an answer before which all tokens are equal in two answers."""
    pairs = list(zip(new.ids, old.ids, strict=False))
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return min(equal + 1, len(pairs))
