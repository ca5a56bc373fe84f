"""Compares what the rollout engine sees and computes with the trainer, before RL and after its first updates.

An engine that reads an image at another size, loses its pixels or counts its positions in another way samples
from another model than the one that learns, and nothing else tells. So the same prompts go through both:
some with images, the same with another image of the same size in its place, and some without. Compared are
the prompts' ids and the placeholders of their images, then the likeliest tokens in place of every token of a
short answer, the first one among them.

How far logprobs may be apart is measured: by how much those of the trainer move when every layer's output is
moved as another kernel's rounding would move it. A fault that is smaller than that shows in its direction:
the trainer computes the answers with each fault that an engine is known for (`engine_faults`), and where
that explains most of the difference, it is the fault. A mismatch stops the run, and names the first layer
that is wrong (`engine_verdict`).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rlcs.data.stored import with_images_among
from rlcs.engines.base import Seen
from rlcs.model.chat import Chat
from rlcs.recipe.stages import Grpo
from rlcs.records import IMAGE_SLOT, Message, Problem, Prompt
from rlcs.records.trees import Branch, Tree
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.engine_faults import (
    OLDER,
    ROUNDING,
    Computed,
    Fault,
    Scorer,
    hypotheses,
    other_rounding,
    swapped,
    with_images,
)
from rlcs.train.engine_verdict import (
    IMAGE,
    MEASURABLE,
    SWAPPED,
    TEXT,
    Answers,
    Case,
    Compared,
    Instance,
    older,
    require_same_prompts,
)

log = logging.getLogger("rlcs")

PROMPTS, TEXTS, TOKENS, CANDIDATES = 3, 2, 16, 8
"""Prompts with images and without, tokens of an answer, and candidates for each token."""
_LOOKED_AT = 12
"""Problems of which the prompts are chosen."""

T = TypeVar("T")


class EngineCheck:
    """The comparisons of one stage: one for each version of the weights, as long as any are left."""

    def __init__(
        self, context: GrpoContext, problems: Sequence[Problem], settings: Grpo, *, say: Callable[[str], None]
    ) -> None:
        """`context.checks` comparisons with prompts of these problems; `say` gets a line about each."""
        self._context, self._problems, self._say = context, problems, say
        self._left = context.checks
        self._version = -1
        self._cases: list[Case] = []
        self._sampling = context.chat.sampling(
            n=1, temperature=settings.temperature, max_new_tokens=min(TOKENS, settings.max_new_tokens)
        )
        self._scorer = Scorer(
            vlm=context.vlm,
            chat=context.chat,
            budget=settings.pack_tokens,
            temperature=settings.temperature,
            banned_ids=self._sampling.banned_ids,
        )
        self._before: dict[str, tuple[Answers, Computed]] = {}
        self._new: Compared | None = None
        self.worst: Compared | None = None
        """The case nearest to its limit in the last comparison."""

    def __call__(self, version: int, clock: Clock) -> None:
        """Compare the weights after `version` steps, which the engine has, unless that was done.

        All ranks call it together, while nothing is sampled. Raises TrainingError on all if they differ.
        """
        if self._left and version != self._version:
            self._version = version
            with clock("check"):
                self._check()

    def values(self) -> dict[str, float]:
        """The metrics of a comparison since the last call, if there was one."""
        worst, self._new = self._new, None
        return {} if worst is None else {"engine_gap": worst.gap, "engine_gap_limit": worst.limit}

    def _check(self) -> None:
        started = time.monotonic()
        self._cases = self._cases or list(cases(self._problems, self._context.chat))
        prompts = [case.prompt for case in self._cases]
        views = (
            self._context.engine.inspect(prompts, self._sampling, candidates=CANDIDATES) if prompts else []
        )
        if self._context.overlap == "none":
            self._context.engine.rest()  # the trainer's passes need the memory
        if not views:
            return
        self._left -= 1
        for view in views:
            require_same_prompts(view, self._cases)
        instances = self._compare([Answers.of(view) for view in views])
        self.worst = self._new = max((one.worst for one in instances), key=lambda each: each.share)
        self._say(self._line(instances, time.monotonic() - started))

    def _line(self, instances: Sequence[Instance], seconds: float) -> str:
        assert self.worst is not None, "it was compared"
        when = f"after step {self._version:,}" if self._version else "before the first step"
        engines = f"{len(instances)} engines compute" if len(instances) > 1 else "the engine computes"
        kinds = [case.kind for case in self._cases]
        _, ours = instances[0].swap_effects()
        images = (
            f"{kinds.count(IMAGE)} with images, the same with other images (a change of {ours:.2g} nats), "
        )
        return (
            f"{when}, {engines} what the trainer does: prompts {images if IMAGE in kinds else ''}"
            f"{kinds.count(TEXT)} without, at most {self.worst.gap:.2g} nats a token apart, allowed are "
            f"{self.worst.limit:.2g} ({self.worst.precision}); {seconds:.1f} s"
        )

    def _compare(self, answers: Sequence[Answers]) -> list[Instance]:
        """Every instance beside the trainer. Raises TrainingError on every rank if one has a fault."""
        world, precisions = self._context.vlm.world, list(map(self._precision, answers))
        candidates, split = _by_tree(answers)
        trees = [
            _tree(case.prompt, [one.view.prompts[i] for one in answers]) for i, case in enumerate(self._cases)
        ]
        trainer = partial(self._scorer, trees, candidates)
        truth = split(trainer())
        with other_rounding(self._context.vlm, max(precisions, key=ROUNDING.__getitem__)):
            moved = split(trainer())
        instances = [
            Instance(
                cases=self._cases,
                answers=one,
                truth=own,
                rounding=(own.logprobs - other.logprobs).abs(),
                precision=precision,
            )
            for one, own, other, precision in zip(answers, truth, moved, precisions, strict=True)
        ]
        found: list[tuple[Fault, list[Computed]]] = []
        if world.any(any(each.gap > MEASURABLE for one in instances for each in one.compared)):
            pairs = [i for i, case in enumerate(self._cases) if case.kind == IMAGE]
            others = {a: self._cases[b].prompt for i in pairs for a, b in ((i, i + 1), (i + 1, i))}
            for fault, compute in hypotheses(self._scorer, trees, candidates, others):
                try:
                    found.append((fault, split(compute())))
                except (RuntimeError, ValueError, TypeError) as error:
                    log.debug("%s: this model cannot be computed so (%s)", fault.text, error)

        def judge() -> None:
            for index, one in enumerate(instances):
                assumed = [(each, computed[index]) for each, computed in found]
                if (before := self._before.get(one.answers.view.name)) is not None:
                    assumed.append((OLDER, older(one, *before)))
                one.require_health(assumed)

        world.first(judge)
        self._before = {one.answers.view.name: (one.answers, one.truth) for one in instances}
        return instances

    def _precision(self, answers: Answers) -> str:
        """The coarser of the number formats of engine and trainer."""
        formats = (answers.view.precision, str(self._context.vlm.model.dtype).removeprefix("torch."))
        return max(
            (name for name in formats if name in ROUNDING), key=ROUNDING.__getitem__, default="bfloat16"
        )


def cases(problems: Sequence[Problem], chat: Chat) -> Iterator[Case]:
    """The prompts that are compared: with images, each followed by the same with others, then some without.

    Of some problems those are taken that show most: several images, and images that are no squares.
    """
    pictured = _spread(with_images_among(problems), _LOOKED_AT)
    made = [(problem, prompt) for problem, prompt in zip(pictured, chat.prompts(pictured), strict=True)]
    shown = [(problem, prompt) for problem, prompt in made if isinstance(prompt, Prompt)]
    shown.sort(key=lambda pair: (-len(pair[1].images), all(h == w for _, h, w in pair[1].grids)))
    for _, prompt in shown[:PROMPTS]:
        other = with_images(prompt, chat, swapped)
        if _grids(other, chat) == prompt.grids:
            yield Case(prompt=prompt, kind=IMAGE)
            yield Case(prompt=other, kind=SWAPPED)
    plain = [_without_images(problem) for problem, _ in shown] or _spread(problems, TEXTS)
    for text in chat.prompts(plain[:TEXTS]):
        if isinstance(text, Prompt):
            yield Case(prompt=text, kind=TEXT)


def _grids(prompt: Prompt, chat: Chat) -> tuple[tuple[int, int, int], ...]:
    """The grids of a prompt's images by their sizes."""
    message = Message(role="user", parts=prompt.images)
    return chat.conversation([message], name=prompt.problem_id).grids


def _without_images(problem: Problem) -> Problem:
    def plain(text: str) -> str:
        return text.replace(IMAGE_SLOT, " ").strip() or "?"

    history = tuple(replace(turn, text=plain(turn.text)) for turn in problem.history)
    return replace(problem, question=plain(problem.question), history=history, images=())


def _spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at most, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _tree(prompt: Prompt, answers: Sequence[Seen]) -> Tree:
    """A prompt with the answer of every instance."""
    branches = (Branch(ids=seen.ids, weights=(0.0,) * len(seen.ids)) for seen in answers)
    return Tree(prompt=prompt, branches=tuple(branches))


def _by_tree(answers: Sequence[Answers]) -> tuple[Tensor, Callable[[Computed], list[Computed]]]:
    """The candidates of all instances in the order of trees that hold an answer of each; and the way back."""
    sizes = [len(one.ids) for one in answers]
    case = torch.cat([one.case for one in answers])
    order = torch.argsort(case, stable=True)
    width = max(one.ids.shape[1] for one in answers)
    widened = [one.ids[:, :1].expand(-1, width).clone() for one in answers]
    for wide, one in zip(widened, answers, strict=True):
        wide[:, : one.ids.shape[1]] = one.ids

    def split(computed: Computed) -> list[Computed]:
        back = torch.argsort(order)
        parts = zip(computed.logprobs[back].split(sizes), computed.banned[back].split(sizes), strict=True)
        return [
            Computed(logprobs=logprobs[:, : one.ids.shape[1]], banned=banned)
            for (logprobs, banned), one in zip(parts, answers, strict=True)
        ]

    return torch.cat(widened)[order], split
