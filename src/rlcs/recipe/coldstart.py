"""The grid of a study of the cold start: which cells there are, in which order they run.

A cell is one run of RL from one model: the base (no cold start), or a checkpoint of an SFT on so many
demonstrations of one kind. The lengths of SFT on the same demonstrations are checkpoints of one training.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

from rlcs.errors import UserError
from rlcs.recipe.loading import changed, load_recipe
from rlcs.recipe.schema import Recipe, Teacher

T = TypeVar("T")

NONE = "none"
"""The kind of the cells without a cold start."""
GIVEN = "given"
"""The kind of demonstrations that the data has."""
CHAINS: tuple[str, ...] = get_args(Teacher.model_fields["chain"].annotation)
"""The kinds that a teacher can write."""
_SHARES = (1, 1 / 8)
"""Shares of the demonstrations that are tried where no numbers are named."""
_LENGTHS = (1 / 4, 1, 2)
"""Lengths of SFT that are tried where none are named, as multiples of `sft.epochs`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a user names of the grid; what is left empty follows from the recipe."""

    demonstrations: tuple[int, ...] = ()
    epochs: tuple[float, ...] = ()
    chains: tuple[str, ...] = ()
    seeds: int = 2
    early_stop: bool = True
    keep_models: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of RL, from a model after `steps` steps of SFT on `demonstrations` of one kind, or the base."""

    chain: str
    demonstrations: int
    epochs: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{NONE}-seed-{self.seed}" if self.chain == NONE else f"{self.sft}-steps-{self.steps}"

    @property
    def sft(self) -> str:
        """The name of the folder of the SFT that its model is a checkpoint of."""
        return f"{self.chain}-{self.demonstrations}-seed-{self.seed}"


def study_words(name: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of a recipe in this study: its own values, and behind them those of the command line.

    Lengths of one SFT can be compared if they end at the same learning rate; RL gets a quarter of its steps.
    """
    own = ["validation.grpo_every=1", "sft.handover.rule=last"]  # see `prepared`
    steps = load_recipe(name, [*own, *overrides]).recipe.grpo.steps
    own += ["sft.optimizer.schedule=constant", f"grpo.steps={math.ceil(steps / 4)}"]
    return [*own, *overrides]


def prepared(recipe: Recipe) -> Recipe:
    """The recipe with validation in the middle of RL, and without a hand-over: lengths are the study's.

    What RL learns from besides the reward (`grpo.also`) is the same in all cells.
    """
    words = [f"validation.grpo_every={math.ceil(recipe.grpo.steps / 2)}", "sft.handover.rule=last"]
    # Held-out ones would make SFT shorter than its cells say.
    words += ["validation.demonstrations=0", "data.max_demonstrations=null"]
    words += ["grpo.also.arms=[grpo, sft_grpo]"] if recipe.grpo.also.is_on else []
    return changed(recipe, words)


def chains_of(wanted: Wanted, recipe: Recipe, *, given: bool) -> tuple[str, ...]:
    """The kinds of demonstrations that are compared: by default those that the data has, or the teacher's.

    `given` says whether every row of the data has a response. Raises UserError for a kind that there is not.
    """
    chains = wanted.chains or ((GIVEN,) if given else (recipe.teacher.chain,))
    for chain in chains:
        if chain not in (GIVEN, *CHAINS):
            raise UserError(
                f"there is no kind of demonstrations called {chain!r}",
                where="--chains",
                fix=f"name some of: {', '.join((GIVEN, *CHAINS))}",
            )
        if chain == GIVEN and not given:
            raise UserError(
                "not all rows of data.cold_start have a response",
                where="--chains given",
                fix=f"name kinds that the teacher writes: {', '.join(CHAINS)}",
            )
    return tuple(dict.fromkeys(chains))


def plan(wanted: Wanted, recipe: Recipe, kept: Mapping[str, int]) -> tuple[Cell, ...]:
    """The cells of the study in the order in which they run; `kept` is how many there are of each kind.

    Every kind is tried with the same numbers, at most those of the kind with the fewest. In each seed the
    cell without a cold start is first, then those with the most demonstrations and the longest SFT: what runs
    early is what others can fail to beat.
    """
    most = min(kept.values())
    wishes = wanted.demonstrations or tuple(math.ceil(share * most) for share in _SHARES)
    counts = sorted({min(count, most) for count in wishes}, reverse=True)
    lengths = lengths_of(wanted, recipe)
    cells = []
    for seed in range(recipe.seed, recipe.seed + wanted.seeds):
        cells.append(Cell(chain=NONE, demonstrations=0, epochs=0.0, steps=0, seed=seed))
        for count in counts:
            steps = {steps_of(epochs, count, recipe): epochs for epochs in reversed(lengths)}
            for chain in kept:
                cells += [
                    Cell(chain=chain, demonstrations=count, epochs=epochs, steps=number, seed=seed)
                    for number, epochs in steps.items()
                ]
    return tuple(cells)


def lengths_of(wanted: Wanted, recipe: Recipe) -> tuple[float, ...]:
    """The lengths of SFT that are compared, in epochs, the shortest first."""
    return tuple(sorted(wanted.epochs or {multiple * recipe.sft.epochs for multiple in _LENGTHS}))


def described(wanted: Wanted, recipe: Recipe) -> str:
    """The grid in words, for the table before a run."""
    counts = [f"{count:,}" for count in wanted.demonstrations] or ["all", "1/8"]
    lengths = ", ".join(f"{epochs:g}" for epochs in lengths_of(wanted, recipe))
    chains = ", ".join(wanted.chains) or "of the data or the recipe's teacher"
    ends = "; a cell that cannot become the best ends in the middle of RL" if wanted.early_stop else ""
    return (
        f"none, or {', '.join(counts)} demonstrations ({chains}) x {lengths} epochs of SFT, "
        f"{wanted.seeds} {'seed' if wanted.seeds == 1 else 'seeds'}{ends}"
    )


def steps_of(epochs: float, count: int, recipe: Recipe) -> int:
    """The optimiser steps of so many passes over `count` demonstrations."""
    return max(1, math.ceil(epochs * count / recipe.sft.batch_size))


def subset(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """A seed's choice of `count` demonstrations, a part of its choice of any larger number."""
    order = list(range(len(rows)))
    random.Random(f"coldstart|{seed}").shuffle(order)
    return [rows[index] for index in sorted(order[:count])]
