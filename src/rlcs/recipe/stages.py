"""The recipe's sections of the two training stages: SFT and GRPO, with their optimisers, loss and reward."""

from collections.abc import Collection, Mapping
from math import ceil
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlcs.recipe.arms import RL_ARMS, ArmName, RlArm
from rlcs.recipe.handover import Handover, Rule
from rlcs.recipe.judge import Judge
from rlcs.recipe.objectives import Also, Entropy, OnlineTeacher, Sight
from rlcs.recipe.section import (
    Above0,
    Beta,
    FrozenPart,
    NonNegative,
    Nucleus,
    Positive,
    Seconds,
    Section,
    Warm,
    Weight,
    Whole,
)

Advantage = Literal["grpo", "dr_grpo", "rloo", "pass_k"]
KlKind = Literal["none", "k1", "k2", "k3"]
Turns = Literal["all", "last"]
Overlap = Literal["none", "on_policy", "one_step_off"]


class Optimizer(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(ge=0, le=10)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: down to zero on a cosine, or flat."""
    warmup_steps: Whole = 0
    """Steps of linear warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Decoupled; not on biases and norms."""
    max_grad_norm: Annotated[float, Field(ge=1e-9, le=1e12)] = 1.0
    """Clip the global gradient norm to this."""


class GrpoOptimizer(Optimizer):
    """AdamW with stage two's defaults: small constant steps."""

    lr: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Learning rate after warm-up."""
    schedule: Literal["cosine", "constant"] = "constant"
    """After warm-up: down to zero on a cosine, or flat."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.01
    """Decoupled; not on biases and norms."""


class Stage(Section):
    """The keys of both training stages."""

    optimizer: Optimizer = Optimizer()
    """Optimiser and schedule."""
    freeze: tuple[FrozenPart, ...] = ()
    """Parts that do not train. In a mixture of experts also `experts`, or the `router` that chooses them."""
    pack_tokens: Positive = 8192
    """Tokens of one packed forward and backward pass; a larger tree is a pack by itself."""
    save_every: Positive = 50
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept."""
    keep_steps: tuple[Positive, ...] = ()
    """Steps whose checkpoint is saved and kept for good, as in [40, 80], for `rlcs export RUN --step 80`."""
    max_bad_steps: Positive = 5
    """Steps in a row with a non-finite gradient before the run stops. So many steps also stop it where they
    are more than a quarter of all steps so far: their gradients are lost."""

    @property
    def rule(self) -> Rule:
        """The rule by which the model is chosen that the stage ends with."""
        return "last"


class Sft(Stage):
    """Stage one: supervised fine-tuning on what the assistant says, with its end tokens, and nothing else."""

    epochs: Above0 = 3.0
    """Passes over the demonstrations."""
    batch_size: Positive = 64
    """Demonstrations an optimiser step."""
    loss_average: Literal["token", "example"] = "token"
    """`token`: mean over all trained tokens of the step; `example`: mean of each demonstration's mean."""
    turns: Turns = "all"
    """Assistant turns of a conversation that are learnt: `all`, or the `last` one."""
    handover: Handover = Handover()
    """Which of its models SFT hands over to RL."""

    @property
    def rule(self) -> Rule:
        """The rule by which the model is chosen that the stage ends with."""
        return self.handover.rule

    def num_steps(self, count: int) -> int:
        """The number of optimiser steps of a whole stage over `count` demonstrations."""
        return max(1, ceil(self.epochs * count / self.batch_size))


class Kl(Section):
    """A penalty that keeps the policy near the reference (the model at the start of the stage)."""

    kind: KlKind = "none"
    """Estimator (http://joschu.net/blog/kl-approx.html); the paper uses k3 in the loss."""
    coefficient: NonNegative = 0.0
    """Weight in the loss; the paper's is 0.01."""

    @property
    def active(self) -> bool:
        """Whether there is a penalty, which needs a reference model."""
        return self.kind != "none" and self.coefficient > 0


class Overlong(Section):
    """Soft penalty for answers near the limit (DAPO, arXiv 2503.14476, eq. 13)."""

    buffer: Whole = 0
    """Tokens before the limit over which the reward falls by up to `penalty`; 0: off."""
    penalty: Weight = 1.0
    """The largest deduction."""
    drop_truncated: bool = False
    """Leave answers cut at the limit out of the loss instead of grading them wrong."""


class Reward(Section):
    """Grading of responses: the plain weighted sum of parts, not divided by the sum of the weights.

    A part of weight 0 is off. Whether an answer is *correct* is what the first of these that is on says:
    accuracy, judge, functions in their order, format. An answer without the score of one part is not scored.
    """

    accuracy: Weight = 1.0
    """Weight of the rule: 1 if the final answer is right, else 0."""
    format: Weight = 0.0
    """Weight of the form: 1 if the reasoning is closed and the final box can be read strictly, else 0."""
    length: Weight = 0.0
    """Weight of brevity within a group (Kimi k1.5, arXiv 2501.12599): from 0.5 for the shortest answer to
    -0.5 for the longest; a wrong answer gets 0 at most."""
    functions: Mapping[str, Annotated[float, Field(ge=-1_000_000, le=1_000_000)]] = {}
    """Functions of your own, each with its weight: {FILE.py:NAME: 0.5}. They are called as
    NAME(problem, response) in grader processes, and return a number, or a pair (number, is it correct)."""
    judge: Judge = Judge()
    """A model that scores answers."""
    allow_fallbacks: bool = False
    """Also accept `<answer>` tags, "the answer is ..." and a lone letter where no box is complete."""
    deadline_s: Seconds = 5.0
    """Most seconds for grading one answer; then its worker is killed and the answer is not scored."""
    workers: Whole = 1
    """Grader processes a machine, of the rule and of each function; 0: one for each two CPU cores. Under
    `torchrun` the ranks of a machine share them, and have one each at least."""

    @model_validator(mode="after")
    def _parts_can_be_summed(self) -> "Reward":
        names = ["accuracy", "format", "length", "judge", *map(function_name, self.functions)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two parts are called {twice[0]}: give the function another name")
        if not self.weights.keys() - {"length"}:
            raise ValueError("no part that scores single answers has a weight: set accuracy=1, say")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part that is on; the first one decides whether an answer is correct."""
        functions = {function_name(function): weight for function, weight in self.functions.items()}
        parts = {"accuracy": self.accuracy, "judge": self.judge.weight} | functions
        parts |= {"format": self.format, "length": self.length}
        return {name: weight for name, weight in parts.items() if weight}


def function_name(function: str) -> str:
    """The name of the function in `FILE.py:NAME`."""
    return function.rpartition(":")[2]


class Grpo(Stage):
    """Stage two: group-relative policy optimisation with a rule-checked reward."""

    optimizer: GrpoOptimizer = GrpoOptimizer()
    """Optimiser and schedule; a schedule step is one optimiser step."""
    steps: Positive = 100
    """Rollout steps."""
    keep: Literal["newest", "best"] = "newest"
    """The model that the stage ends with: that of the last step, or the one with the best accuracy in
    validation (the earlier of equals), whose checkpoint is kept too. `best` needs `validation`."""
    prompts_per_step: Positive = 32
    """Problems a rollout step."""
    group_size: Annotated[int, Field(ge=2, le=1_000_000)] = 8
    """Rollouts a problem (G)."""
    order: Literal["shuffled", "signal", "easy_first"] = "shuffled"
    """The order of the problems. `shuffled`: all in a new order every epoch. `signal`: by a running estimate
    of each problem's pass rate (from its `pass_rate` in the data, where it has one), those whose answers are
    likely to differ in their reward come more often (Thompson sampling, arXiv 2507.04632). `easy_first`: by
    the same estimate, from pass rates around 0.8 to those around 0.2 over the stage. In both, one problem in
    8 still comes in shuffled order."""
    optimizer_steps: Positive = 1
    """Optimiser steps a rollout step, each on its share of the groups; the paper takes 4."""
    temperature: Warm = 1.0
    """Sampling temperature; logprobs are taken at the same temperature."""
    top_p: Nucleus = 1.0
    """Nucleus sampling; not corrected for in the ratio, as in the peers."""
    max_new_tokens: Positive = 2048
    """Longest answer in tokens."""
    max_rows: Positive = 256
    """Rollouts decoded at once by the local engine."""
    advantage: Advantage = "grpo"
    """`grpo`: (r - mean) / (std + 1e-6); `dr_grpo`: r - mean; `rloo`: r - mean of the others;
    `pass_k`: as if sets of `pass_k` answers were rewarded by their best one (arXiv 2508.10751)."""
    pass_k: Annotated[int, Field(ge=2, le=1_000_000)] = 4
    """Answers of a set in `advantage=pass_k`, below `group_size`."""
    loss: Literal["grpo", "gspo", "cispo", "sapo", "dppo"] = "grpo"
    """`grpo`: clipped token ratios; `gspo`: clipped sequence ratios; `cispo`: clipped detached weights;
    `sapo`: a soft gate on the ratio; `dppo`: no gradient where a token's probability has moved too far."""
    clip_low: NonNegative = 0.2
    """Ratios below 1 - clip_low are clipped; `dppo`: probabilities that fell by more than clip_low."""
    clip_high: NonNegative = 0.3
    """Ratios above 1 + clip_high are clipped; 0.3 is what the paper's code ran with (clip-higher). `dppo`:
    probabilities that rose by more than clip_high."""
    sapo_temperatures: tuple[Above0, Above0] = (1.0, 1.05)
    """Temperatures of the soft gate of `sapo`, for answers with a positive advantage and for others."""
    clip_dual: Annotated[float, Field(gt=1, le=1_000_000)] | None = 3.0
    """Bound of the ratio where the advantage is negative (dual clip); None: off."""
    loss_average: Literal["token", "sequence", "constant", "micro_batch"] = "token"
    """`token`: global token mean; `sequence`: mean of sequence means (GRPO paper); `constant`: sum over
    (sequences * max_new_tokens) (Dr. GRPO); `micro_batch`: token mean of each pack (the paper's code)."""
    old_logprobs: Literal["sampler", "policy"] = "sampler"
    """Base of the ratio with several optimiser steps: the sampler's logprobs, or one more pass."""
    overlap: Overlap | None = None
    """What goes on while the servers of `vllm_server` sample. `none`: nothing. `on_policy`: groups are graded
    and learnt from as they arrive, with the gradient of a step that waits for all. `one_step_off`: the next
    step is sampled meanwhile, too, by weights that are one step older; importance weights correct for that.
    None: `on_policy` where it is possible (vllm_server, another loss_average than micro_batch)."""
    kl: Kl = Kl()
    """Divergence from the reference."""
    overlong: Overlong = Overlong()
    """Answers near or at the length limit."""
    mismatch_mask: Above0 | None = None
    """Answers with a negative advantage are left out where the policy has moved away from the sampler by more
    than this: the mean log ratio of their tokens, in nats (DeepSeek-V3.2, arXiv 2512.02556). None: off."""
    entropy: Entropy = Entropy()
    """What keeps answers from becoming all alike."""
    sight: Sight = Sight()
    """A reward for looking at the image."""
    also: Also = Also()
    """Other losses in the steps of RL: demonstrations, a teacher."""
    teacher: OnlineTeacher = OnlineTeacher()
    """Who scores answers in on-policy distillation."""
    reward: Reward = Reward()
    """Grading."""
    dynamic_sampling: Whole = 0
    """Extra rollout rounds a step to replace groups whose rewards are all equal (DAPO); 0: off."""
    max_zero_variance_steps: Positive = 20
    """Steps in a row without any reward difference before the run stops."""

    @property
    def rule(self) -> Rule:
        """The rule by which the model is chosen that the stage ends with."""
        return "best_pass_1" if self.keep == "best" else "last"

    def of(self, arm: RlArm) -> "Grpo":
        """The settings of one arm: `also` with the weights of that arm."""
        return self.model_copy(update={"also": self.also.of(arm)})

    @model_validator(mode="after")
    def _entropy_can_be_controlled(self) -> "Grpo":
        if self.entropy.control == "kl_cov" and self.optimizer_steps == 1:
            raise ValueError(
                "entropy.control=kl_cov holds tokens near where they were sampled, and with "
                "optimizer_steps=1 they are there: set optimizer_steps=2 or more, or entropy.control=clip_cov"
            )
        if self.entropy.control == "clip_cov" and self.loss == "gspo":
            raise ValueError(
                "entropy.control=clip_cov takes the gradient of single tokens away, and loss=gspo has one "
                "ratio for a whole answer: set entropy.control=kl_cov, or loss=grpo"
            )
        return self

    @model_validator(mode="after")
    def _sets_are_smaller_than_groups(self) -> "Grpo":
        if self.advantage == "pass_k" and self.pass_k >= self.group_size:
            raise ValueError(
                f"advantage=pass_k compares sets of pass_k ({self.pass_k}) among group_size "
                f"({self.group_size}) answers: pass_k must be smaller"
            )
        return self

    @model_validator(mode="after")
    def _losses_can_be_added(self) -> "Grpo":
        also = self.also
        if "distill" in also.ever and self.teacher.model is None:
            raise ValueError("also.distill needs a teacher: set grpo.teacher.model")
        if self.teacher.model is not None and "distill" not in also.ever:
            raise ValueError("teacher.model is not used: set also.distill, to 1 say")
        if "distill" in also.ever and self.teacher.base_url and self.temperature != 1:
            raise ValueError(
                "a server returns logprobs at temperature 1: set grpo.temperature=1, or load the teacher "
                "here (teacher.base_url=null)"
            )
        of_reward = {
            "kl": self.kl.active,
            "sight": self.sight.coefficient > 0,
            "entropy": self.entropy.control != "none",
            "mismatch_mask": self.mismatch_mask is not None,
        }
        if "reward" not in also.ever and (lost := [key for key, is_on in of_reward.items() if is_on]):
            raise ValueError(
                f"{lost[0]} belongs to the loss of the reward, and also.reward=0 leaves that out"
            )
        return self

    def require_arms(self, arms: Collection[ArmName]) -> None:
        """Raise ValueError where `also` does not fit the arms of a study, or a loss that one of them adds."""
        self.also.require_arms(arms)
        for arm in RL_ARMS:
            others = {"sft", "distill"} & self.also.of(arm).ever
            if arm in arms and others and self.loss_average == "micro_batch":
                raise ValueError(
                    f"loss_average=micro_batch is a mean of each pack, and also.{min(others)} in the arm "
                    f"{arm} has a mean of the step: set grpo.loss_average=token"
                )
