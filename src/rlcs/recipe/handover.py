"""The recipe's section of the hand-over: with which of its checkpoints SFT hands over to RL."""

from typing import Annotated, Literal

from pydantic import Field

from rlcs.recipe.section import Positive, Section, Share

Rule = Literal["last", "best_pass_1", "best_pass_k", "most_signal", "probe"]


class Handover(Section):
    """Which model of SFT goes on: the last one, or the one that measurements or trials of RL prefer."""

    rule: Rule = "last"
    """`last`: the model after the last step. By validation (`validation.sft_every`): `best_pass_1` and
    `best_pass_k` take the best accuracy and the best pass@k, `most_signal` the largest share of groups with
    two different rewards. `probe`: RL itself is tried from several checkpoints, and the one that it lifts
    highest goes on; the others' steps come out of those of RL (`grpo.steps`)."""
    candidates: Annotated[int, Field(ge=2)] = 4
    """Checkpoints that `probe` tries: the most promising ones in validation."""
    round_steps: Positive = 6
    """Steps of RL that each candidate gets in a round; after a round the better half stays."""
    most_share: Annotated[Share, Field(gt=0)] = 0.25
    """Largest share of `grpo.steps` that the losers may take together."""
