"""Other losses in a step of RL, each with its own mean: demonstrations, and a teacher's view of the answers.

The loss of an optimiser step is the plain sum

    reward * L_reward / D  +  sft * L_sft / T_sft  +  distill * L_distill / T

with the weights of `grpo.also` at this step, L the summed losses of all ranks, D the divisor of
`grpo.loss_average`, T_sft the demonstrated tokens of the step, and T the sampled tokens of the answers that
are in the loss. The trainer divides once, by D, whatever packs the trees lie in and whenever their groups
come. So L_distill is multiplied by D / T, and L_sft by D / T_sft: with `loss_average=token` D is T, and
groups can be learnt from as they arrive; with another average only when all have come. Demonstrations come
last: then D is known. Where the reward's weight is 0, the trainer divides by T.

On-policy distillation (https://thinkingmachines.ai/blog/on-policy-distillation/; the reverse KL of MiniLLM,
arXiv 2306.08543, and of GKD, arXiv 2306.13649) is a policy gradient: the advantage of each sampled token is
log p_teacher - log p_student, without gradient. Its expectation under the student is minus the reverse KL at
that token. It goes through the same bounds and ratios as an advantage of the reward.
"""

import logging
from dataclasses import replace

from rlcs.data.stream import ProblemStream
from rlcs.distributed import World
from rlcs.model.policy import Scores
from rlcs.recipe.objectives import Entropy, Sight, Weights
from rlcs.recipe.stages import Grpo, Kl
from rlcs.records import Demonstration
from rlcs.train import sft
from rlcs.train.batching import packs_in_step
from rlcs.train.context import GrpoContext
from rlcs.train.inputs import inputs_of
from rlcs.train.losses import Average, LossSums, denominator, policy_loss
from rlcs.train.trainer import Batch, Objective, Trainer, ZeroGradCounts

log = logging.getLogger("rlcs")


class Mixer:
    """The other losses of a stage: their weights in each step, and the demonstrations."""

    def __init__(self, context: GrpoContext, settings: Grpo, *, seed: int) -> None:
        """`context` has demonstrations where `settings.also` gives them a weight, and a teacher likewise."""
        self._context, self._settings = context, settings
        self.weights = settings.also.at(0, settings.steps)
        self._named = set[str]()
        self.demonstrations: ProblemStream[Demonstration] | None = None
        if "sft" in settings.also.ever:
            self.demonstrations = ProblemStream(context.demonstrations, seed=seed)

    def begin(self, step: int) -> "Mixer":
        """Take the weights of a step (from 0); images of its demonstrations begin to be decoded."""
        self.weights = self._settings.also.at(step, self._settings.steps)
        if self.demonstrations is not None and self.weights.sft:
            sft.prepared_share(self.demonstrations.peek(self._batch_size), self._context.chat, self._world)
        return self

    @property
    def values(self) -> dict[str, float]:
        """The weights of this step as metrics; none where the reward is alone, with weight 1."""
        if not self._settings.also.is_on:
            return {}
        return {f"weight_{name}": getattr(self.weights, name) for name in ("reward", "sft", "distill")}

    @property
    def learns_without_reward(self) -> bool:
        """Whether a step has a gradient although all its rewards are equal."""
        return self.weights.sft > 0 or self.weights.distill > 0

    @property
    def average(self) -> Average:
        """What the trainer divides by: the reward's own average, or tokens where the reward has no weight."""
        return self._settings.loss_average if self.weights.reward else "token"

    @property
    def waits(self) -> bool:
        """Whether the divisors must be known before the first pack is learnt from."""
        return self.weights.distill > 0 and self.average != "token"

    def divisor(self, counts: ZeroGradCounts) -> float:
        """What the trainer divides the sums of these trees by, all those of the step."""
        limit = self._settings.max_new_tokens
        return denominator(
            self.average, tokens=counts.tokens, sequences=counts.sequences, max_new_tokens=limit
        )

    def objective(self, reward: Objective, counts: ZeroGradCounts) -> Objective:
        """The loss of answers, of the step's `reward` objective and of the teacher's.

        `counts` are those of all trees of the optimiser step, as far as `waits` needs them.
        """
        weights, settings, cap = self.weights, self._settings, self._context.importance_cap
        if weights == Weights(reward=1.0, sft=weights.sft, distill=0.0):
            return reward
        ratio = self.divisor(counts) / max(1, counts.tokens) if self.waits else 1.0

        def objective(batch: Batch, scores: Scores) -> LossSums:
            first = reward(batch, scores)
            if not weights.distill:
                return replace(first, loss=weights.reward * first.loss)
            second = distill_loss(batch, scores, settings, cap=cap, alone=not weights.reward)
            loss = weights.distill * ratio * second.loss
            if weights.reward:
                loss = loss + weights.reward * first.loss
            return replace(first, loss=loss, sums={**first.sums, **second.sums})

        return objective

    def add_demonstrations(self, trainer: Trainer, counts: ZeroGradCounts) -> bool:
        """Add this optimiser step's demonstrations; `counts` are those of all its answers. Whether it did."""
        if self.demonstrations is None or not self.weights.sft:
            return False
        chat, world = self._context.chat, self._world
        taken = self.demonstrations.take(self._batch_size)
        trees, bad = sft.usable_trees(taken, chat, world, turns=self._context.turns)
        for error in bad:
            if error.where not in self._named:
                self._named.add(error.where)
                log.warning("a demonstration is left out: %s", error)
        packs = packs_in_step(trees, chat, budget=self._settings.pack_tokens, world=world)
        tokens = world.sum({"tokens": float(sum(int((pack.weights != 0).sum()) for pack in packs))})["tokens"]
        scale = self.weights.sft * self.divisor(counts) / max(1.0, tokens)
        own = sft.make_objective("token")

        def objective(batch: Batch, scores: Scores) -> LossSums:
            sums = own(batch, scores)
            mean = sums.loss.detach() / max(1.0, tokens)
            return replace(sums, loss=scale * sums.loss, sums={"sft_loss": mean}, extra=True)

        for pack in packs:
            trainer.add(Batch(pack=pack), objective)
        return True

    @property
    def _batch_size(self) -> int:
        return self._settings.also.sft_batch_size

    @property
    def _world(self) -> World:
        return self._context.vlm.world


def distill_loss(
    batch: Batch, scores: Scores, settings: Grpo, *, cap: float | None = None, alone: bool = True
) -> LossSums:
    """The summed loss of on-policy distillation of one pack, with the surrogate of `settings.loss`.

    The advantage of a token is log p_teacher - log p_student, at most `teacher.bound` on either side. The
    student is the policy that the ratio starts from. `alone`: the loss of the router is added here, not to
    the reward's loss. Reported: `teacher_kl`, the sum of log p_student - log p_teacher without the bound,
    whose mean estimates the reverse KL of a token, and `teacher_held`, where the bound holds.
    """
    inputs = inputs_of(batch, scores, cap)
    assert batch.teacher_logprobs is not None, "the teacher has scored the pack"
    gap = batch.teacher_logprobs.to(inputs.old_logprobs.device) - inputs.old_logprobs
    bound = settings.teacher.bound
    router_loss = inputs.router_loss if alone else None
    advantages = gap.clamp(-bound, bound)
    inputs = replace(inputs, advantages=advantages, ref_logprobs=None, router_loss=router_loss, held=None)
    of_reward = {"kl": Kl(), "mismatch_mask": None, "entropy": Entropy(), "sight": Sight()}
    sums = policy_loss(inputs, settings.model_copy(update={"loss_average": "token", **of_reward}))
    return replace(sums, sums={"teacher_kl": -gap.sum(), "teacher_held": (gap.abs() > bound).sum()})
