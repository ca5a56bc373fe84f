"""The recipe's sections of what RL learns from beside the reward: entropy, sight, examples, a teacher."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlcs.recipe.arms import ArmName
from rlcs.recipe.section import NonNegative, Positive, Section, Share

Over = tuple[NonNegative, NonNegative]
"""A weight at the first step and at the last one, on a straight line between."""


class Entropy(Section):
    """What keeps answers from becoming all alike: the entropy that RL has to work with."""

    control: Literal["none", "clip_cov", "kl_cov", "bonus"] = "none"
    """`clip_cov`, `kl_cov` (arXiv 2505.22617): the few tokens that lower entropy most, those whose logprob
    and advantage are high together, get no gradient, or a penalty on how far they move. `bonus` (arXiv
    2505.22312): while the entropy is below `target`, more of it is rewarded, with a weight that adapts."""
    share: Share | None = None
    """Share of the tokens that `clip_cov` or `kl_cov` holds. None: the paper's, 2e-4 and 2e-3."""
    coefficient: NonNegative = 1.0
    """Weight of the penalty of `kl_cov`."""
    target: NonNegative = 0.2
    """Nats a token below which `bonus` rewards entropy."""
    bonus_step: NonNegative = 0.005
    """By how much the weight of the bonus rises in a step below the target, and falls in one above it."""


class Sight(Section):
    """A reward for looking at the image (PAPO, arXiv 2507.06448).

    The probabilities of an answer shall be others where the image cannot be seen.
    """

    coefficient: NonNegative = 0.0
    """Weight of the divergence between the policy that sees the image and the same one with a masked image,
    which is made larger; 0: off. The paper's is 0.01 to 0.02."""
    mask_share: Share = 0.6
    """Share of the image's patches that are black, at random, others in every step."""
    entropy_coefficient: NonNegative = 0.03
    """Weight of the entropy of both policies, which is made smaller, so that the divergence does not grow by
    mere noise."""
    gradient: Literal["seeing", "both"] = "seeing"
    """`seeing`: what the policy makes of the masked image is a constant, as in the authors' runs, and costs
    a pass without gradients; `both`: the paper's formula, in which it has a gradient, too."""


class Also(Section):
    """Other weights on the same trees as the reward's: demonstrations, and what a teacher thinks of them."""

    reward: NonNegative | Over = 1.0
    """Weight of the reward's loss; 0 leaves it out. A pair [FIRST, LAST] goes from one to the other over the
    steps of the stage, here and below."""
    sft: NonNegative | Over = 0.0
    """Weight of the loss on demonstrations (negative log likelihood, a token's mean)."""
    distill: NonNegative | Over = 0.0
    """Weight of on-policy distillation: each token of the student's own answers gets what the teacher thinks
    of it (log of the teacher's probability over the student's). Needs `grpo.teacher`."""
    sft_batch_size: Positive = 32
    """Demonstrations in an optimiser step."""
    arms: tuple[ArmName, ...] = ("mixed",)
    """The arms of RL to which this applies; all others learn from the reward alone."""

    @property
    def ever(self) -> frozenset[str]:
        """The names of the weights that are above 0 at some step."""
        weights = {name: getattr(self, name) for name in ("reward", "sft", "distill")}
        return frozenset(name for name, weight in weights.items() if weight not in (0, (0, 0)))

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "Also":
        if not self.ever:
            raise ValueError("reward, sft and distill all have a weight of 0: nothing would be learnt")
        return self


class OnlineTeacher(Section):
    """The teacher of on-policy distillation: it scores the student's answers token by token.

    It needs the student's tokenizer: what it scores are the student's own tokens.
    """

    model: str | None = None
    """A folder, a hub id or a run; with `base_url` the model's name on that server."""
    base_url: str | None = None
    """A server that returns the logprobs of a prompt (vLLM), as `http://localhost:8000/v1`. None: the model
    is loaded beside the policy."""
    api_key_env: str | None = None
    """Environment variable with the server's key."""
    bound: Annotated[float, Field(gt=0)] = 5.0
    """Largest difference of logprobs that counts, in nats."""
