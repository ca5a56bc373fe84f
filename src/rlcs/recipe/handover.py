"""The recipe's section of the hand-over: with which of its checkpoints SFT hands over to RL."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from rlcs.recipe.section import Positive, Section

Rule = Literal["last", "best_pass_1", "best_pass_k", "most_signal", "probe"]


class Handover(Section):
    """Which model of SFT goes on: the last one, or the one that measurements or trials of RL prefer."""

    rule: Rule = "last"
    """`last`: the model after the last step. By validation (`validation.sft_every`): `best_pass_1` and
    `best_pass_k` take the best accuracy and the best pass@k, `most_signal` the largest share of groups with
    right and wrong answers. `probe`: RL itself is tried from what each of these rules would take, and the
    trial that gets highest goes on; the others' steps come out of those of RL (`grpo.steps`)."""
    round_steps: Positive = 6
    """Steps of RL that each candidate of `probe` gets in a round; after a round the better half stays."""
    most_share: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Largest share of `grpo.steps` that the losers of `probe` may take together."""

    @property
    def rounds(self) -> tuple[int, ...]:
        """How many of the most candidates are tried in each round of `probe`."""
        return rounds_of(MOST_CANDIDATES)

    @property
    def most_steps(self) -> int:
        """The most steps of RL that the losers of `probe` take together."""
        return losers_steps(MOST_CANDIDATES, self.round_steps)


MOST_CANDIDATES = 4
"""`probe` tries what the other rules take, each step once."""


def rounds_of(candidates: int) -> tuple[int, ...]:
    """How many candidates each round begins with; after a round the better half stays, until one is left."""
    alive: tuple[int, ...] = ()
    while candidates > 1:
        alive, candidates = (*alive, candidates), (candidates + 1) // 2
    return alive


def losers_steps(candidates: int, round_steps: int) -> int:
    """The steps of RL that all candidates but the winner take together, each until its last round."""
    alive = (*rounds_of(candidates), 1)
    return round_steps * sum(number * (a - b) for number, (a, b) in enumerate(pairwise(alive), start=1))
