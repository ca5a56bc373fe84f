"""The recipe's sections of what RL learns from beside the reward: entropy, sight, examples, a teacher."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlcs.recipe.arms import RL_ARMS, ArmName, RlArm
from rlcs.recipe.sampling import Endpoint
from rlcs.recipe.section import Above0, NonNegative, Positive, Seconds, Section, Share, Whole

Bound = Annotated[float, Field(ge=-1_000_000, le=1_000_000)]
Over = tuple[NonNegative, NonNegative]
"""A weight at the first step and at the last one, on a straight line between."""


class Entropy(Section):
    """What keeps answers from becoming all alike: the entropy that RL has to work with."""

    control: Literal["none", "clip_cov", "kl_cov", "bonus"] = "none"
    """`clip_cov`, `kl_cov` (arXiv 2505.22617): a few of the tokens that lower entropy most, those with
    logprob and advantage both high or both low, get no gradient (`clip_cov`), or a penalty on how far they
    move (`kl_cov`). `bonus` (arXiv 2505.22312): entropy is rewarded while it is below `target`, with a weight
    that adapts."""
    share: Share | None = None
    """Share of an optimiser step's tokens that `clip_cov` or `kl_cov` acts on, one token at least. None: the
    paper's, 2e-4 and 2e-3."""
    bounds: tuple[Bound, Bound] = (1.0, 5.0)
    """`clip_cov` draws among the tokens whose covariance lies between these."""
    coefficient: NonNegative = 1.0
    """Weight of the penalty of `kl_cov`, on the size of a token's log ratio."""
    target: NonNegative = 0.2
    """The entropy up to which `bonus` rewards it, in nats a token."""
    bonus_step: NonNegative = 0.005
    """By how much the weight of the bonus rises after a step below the target, and falls after one above it;
    it begins at 0."""
    bonus_max: NonNegative = 1.0
    """Largest weight of the bonus."""

    @property
    def holds_tokens(self) -> bool:
        """Whether single tokens are held, which are chosen among all of an optimiser step."""
        return self.control in ("clip_cov", "kl_cov")

    @property
    def held_share(self) -> float:
        """`share`, or the paper's."""
        return self.share if self.share is not None else {"clip_cov": 2e-4}.get(self.control, 2e-3)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "Entropy":
        if self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"no covariance lies between bounds={list(self.bounds)}: set [1, 5], say")
        return self


class Sight(Section):
    """A reward for looking at the image (PAPO, arXiv 2507.06448).

    The policy is rewarded for giving its answers other probabilities when the image is masked.
    """

    coefficient: NonNegative = 0.0
    """How much the policy is rewarded for its divergence from itself with a masked image; 0: off. The paper
    has 0.01 to 0.02."""
    mask_share: Share = 0.6
    """Share of the image's patches that are made black, drawn anew in every step."""
    entropy_coefficient: NonNegative = 0.03
    """Weight of a penalty on the entropies with both images, so that the divergence does not grow by mere
    noise."""
    gradient: Literal["seeing", "both"] = "seeing"
    """`seeing`: only the pass with the image has a gradient, as in the authors' runs; `both`: the one with
    the masked image has one too, as in the paper's formula, and costs as much again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The weights of the losses of one step."""

    reward: float
    sft: float
    distill: float


class Also(Section):
    """Other losses in the steps of RL: on demonstrations, and on what a teacher thinks of the answers."""

    reward: NonNegative | Over = 1.0
    """Weight of the reward's loss; 0 leaves it out. A pair [FIRST, LAST] goes from one to the other over the
    steps of the stage, here and below."""
    sft: NonNegative | Over | None = None
    """Weight of the loss on the demonstrations of `data.cold_start` (negative log likelihood, the mean of the
    step's demonstrated tokens). None: [1, 0] in the arm `mixed`, and 0 in others."""
    distill: NonNegative | Over = 0.0
    """Weight of on-policy distillation: the advantage of each token of the student's own answers is the log
    of the teacher's probability over the student's (the mean of the step's sampled tokens). Needs
    `grpo.teacher`."""
    sft_batch_size: Positive = 32
    """Demonstrations in an optimiser step."""
    arms: tuple[RlArm, ...] = ("mixed",)
    """The arms of RL to which this applies; all others learn from the reward alone."""

    def of(self, arm: RlArm) -> "Also":
        """What an arm learns from: all of this, or the reward alone."""
        if arm not in self.arms:
            return Also(sft=0.0, arms=self.arms)
        sft = ((1.0, 0.0) if arm == "mixed" else 0.0) if self.sft is None else self.sft
        return self.model_copy(update={"sft": sft})

    def require_arms(self, arms: Collection[ArmName]) -> None:
        """Raise ValueError where the weights do not fit the arms of a study."""
        key = "grpo.also.arms"
        of_rl = [arm for arm in RL_ARMS if arm in arms]
        if self.is_on and of_rl and not {*self.arms} & {*of_rl}:
            raise ValueError(
                f"grpo.also is set for {', '.join(self.arms) or 'no arm'}, and this study has {of_rl[0]}: "
                f"name it in {key}, or add an arm to study.arms"
            )
        if "grpo" in self.arms and "sft" in self.ever:
            raise ValueError(
                f"the arm grpo learns from no demonstrations: set grpo.also.sft=0, or name mixed in {key}"
            )
        if "mixed" in arms and "sft" not in self.of("mixed").ever:
            raise ValueError(
                f"the arm mixed learns from demonstrations: set grpo.also.sft, with mixed in {key}"
            )
        if idle := next((arm for arm in self.arms if not self.of(arm).ever), None):
            raise ValueError(f"grpo.also: all weights are 0 in the arm {idle}: nothing would be learnt")

    def at(self, step: int, steps: int) -> Weights:
        """The weights of step `step` (from 0) of `steps`, on straight lines."""
        done = step / max(1, steps - 1)
        pairs = (
            (w if isinstance(w, tuple) else (w, w)) for w in (self.reward, self.sft or 0.0, self.distill)
        )
        reward, sft, distill = (first + (last - first) * done for first, last in pairs)
        return Weights(reward=reward, sft=sft, distill=distill)

    @property
    def is_on(self) -> bool:
        """Whether steps learn from anything but the reward, or from that with another weight than 1."""
        return self.ever != {"reward"} or self.reward != 1

    @property
    def ever(self) -> frozenset[str]:
        """The names of the weights that are above 0 at some step."""
        weights = {name: getattr(self, name) for name in ("reward", "sft", "distill")}
        return frozenset(name for name, weight in weights.items() if weight not in (None, 0, (0, 0)))


class OnlineTeacher(Section):
    """The teacher of on-policy distillation: it scores the student's answers token by token.

    What it scores are the student's own tokens, on the student's own patches of images: it needs the
    student's tokenizer, chat format and size of patches, as larger models of one family have.
    """

    model: str | None = None
    """A folder, a hub id or a run; with `base_url` the model's name on that server."""
    base_url: str | None = None
    """A vLLM server, as `http://localhost:8000/v1`, that was started with `--enable-scale-out`. None: the
    model is loaded beside the policy, in the same number format and over the same ranks."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key."""
    concurrency: Positive = 32
    """Answers that each rank has scored by the server at the same time."""
    request_timeout_s: Seconds = 600.0
    """Seconds one attempt at one answer may take in all."""
    max_retries: Whole = 6
    """Further attempts after a failure that may be temporary."""
    bound: Above0 = 5.0
    """Largest difference of logprobs that counts, in nats."""

    @property
    def endpoint(self) -> Endpoint | None:
        """The server, if it is one. Raises RecipeError where its address holds a secret."""
        if self.base_url is None:
            return None
        shared = {name: getattr(self, name) for name in ("key_env", "concurrency", "max_retries")}
        return Endpoint(
            base_url=self.base_url,
            model=str(self.model),
            section="grpo.teacher",
            request_timeout_s=self.request_timeout_s,
            **shared,
        )

    @model_validator(mode="after")
    def _server_is_usable(self) -> "OnlineTeacher":
        if self.base_url is not None and self.model is None:
            raise ValueError("a teacher on a server needs model, its name there")
        _ = self.endpoint
        return self
