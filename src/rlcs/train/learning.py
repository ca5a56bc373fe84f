"""Learns from the groups of a rollout step: packs, old and reference logprobs, the loss, optimiser steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from rlcs.model.image_features import affordable_patches, kept_patches
from rlcs.model.packing import Pack
from rlcs.model.policy import Scores
from rlcs.recipe.stages import Grpo
from rlcs.records import Group
from rlcs.records.trees import Tree
from rlcs.train.batching import NONE, Keep, full_packs_in_step, own_share, packs_in_step
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.entropy import with_held_tokens
from rlcs.train.groups import tree_of, zero_variance
from rlcs.train.inputs import inputs_of
from rlcs.train.losses import LossSums, policy_loss
from rlcs.train.mixing import Mixer
from rlcs.train.sight import with_sight
from rlcs.train.trainer import Batch, Objective, StepResult, Trainer, ZeroGradCounts, logprobs_of


@dataclass(kw_only=True)
class _Share:
    """The groups of one optimiser step: trees that are in no pack yet, packs that are not learnt yet.

    `zero_grad` are trees that only count, `missing` is the number of groups that have not come, `number` that
    of the optimiser step, `counts` are those of all that have come.
    """

    missing: int
    number: int
    trees: list[Tree] = field(default_factory=list)
    zero_grad: list[Tree] = field(default_factory=list)
    counts: ZeroGradCounts = field(default_factory=ZeroGradCounts)
    batches: list[Batch] = field(default_factory=list)
    begun: bool = False


class Learner:
    """Takes the optimiser steps of one rollout step, each on its share of the groups, in their order.

    Groups are learnt from as they are added: in `advance` those that fill packs on every rank, in `finish`
    all others. The trainer divides once, when a share is complete, so a gradient is the same in whatever
    parts its groups come, but for the order of summation.

    Shares are runs of places in the step, as in a step that waits for all groups; in the order of arrival the
    first would hold the short answers, and the weights would depend on the servers' timing. With old logprobs
    by the sampler, optimiser steps are taken before the last group is there. With old logprobs by the policy,
    packs of all shares get theirs as they fill, and the first share is learnt from, but the weights change
    when all groups have come.

    Without a KL penalty, a router loss, an entropy bonus, a teacher and `grpo.sight`, a group whose rewards
    are all equal has a gradient of exactly zero: it is not computed, but its tokens still count in the mean
    (not in `micro_batch`, whose mean is of each computed pack).

    Where entropy control holds tokens (`train.entropy`), it chooses among all of an optimiser step, so that
    the choice depends on no pack: then packs of a share are made when its groups have all come.
    """

    def __init__(
        self,
        trainer: Trainer,
        context: GrpoContext,
        settings: Grpo,
        clock: Clock,
        mixer: Mixer | None = None,
        *,
        entropy_weight: float = 0.0,
    ) -> None:
        """Nothing is learnt before the first group is added; `mixer` has begun the step.

        For `entropy_weight` see `train.entropy`.
        """
        self._mixer = mixer or Mixer(context, settings, seed=0)
        if not self._mixer.weights.distill:
            context = replace(context, teacher=None)
        self._trainer, self._context, self._settings, self._clock = trainer, context, settings, clock
        self._objective = make_objective(settings, context.importance_cap, entropy_weight)
        if settings.sight.coefficient:
            self._objective = with_sight(self._objective, context, settings, seed=trainer.done)
        self._entropy_gradient = entropy_weight > 0
        # A mixture's loss counts how often each token is used.
        self._merges = context.vlm.family.router is None
        count, steps = settings.prompts_per_step, settings.optimizer_steps
        self._size = -(-count // steps)
        self._shares = [
            _Share(missing=min(self._size, count - start), number=trainer.done + number)
            for number, start in enumerate(range(0, count, self._size))
        ]
        self._results: list[StepResult] = []
        self._done = 0

    @property
    def has_stepped(self) -> bool:
        """Whether the weights are no longer those of the step's beginning."""
        return bool(self._results)

    def add(self, placed: Sequence[tuple[int, Group]]) -> None:
        """Take up groups, each after its place in the step; all ranks add the same."""
        for place, group in placed:
            share = self._shares[place // self._size]
            share.missing -= 1
            other_losses = self._settings.kl.active or bool(self._context.vlm.router_loss)
            other_losses |= self._settings.entropy.control == "bonus"
            other_losses |= self._settings.sight.coefficient > 0
            known_zero = zero_variance(group) and not other_losses
            weights, tree = self._mixer.weights, tree_of(group, merges=self._merges)
            known_zero = not weights.distill and (known_zero or not weights.reward)
            share.counts += ZeroGradCounts.of([tree])
            (share.zero_grad if known_zero else share.trees).append(tree)

    def advance(self) -> None:
        """Learn from the packs that the groups so far fill on every rank."""
        with self._clock("reference"):
            for share in self._shares[self._done :]:
                if not share.missing:
                    self._prepare_rest(share)
                elif share.trees and not self._settings.entropy.holds_tokens:
                    self._prepare_full(share)
        with self._clock("update"):
            self._learn(final=False)

    def finish(self) -> list[StepResult]:
        """Learn from the rest, as no group will be added. The results of the optimiser steps, if any."""
        with self._clock("reference"):
            for share in self._shares[self._done :]:
                self._prepare_rest(share)
        with self._clock("update"):
            self._learn(final=True)
        return self._results

    def _prepare_full(self, share: _Share) -> None:
        context = self._context
        packs, share.trees = full_packs_in_step(
            [tree for tree in share.trees if tree.branches],
            context.chat,
            budget=self._settings.pack_tokens,
            world=context.vlm.world,
            keep=self._keep(),
        )
        share.batches += with_logprobs(packs, context, self._settings, first=share is self._shares[0])

    def _prepare_rest(self, share: _Share) -> None:
        first, entropy = share is self._shares[0], self._settings.entropy
        if entropy.holds_tokens and share.trees:
            share.trees = with_held_tokens(share.trees, share.zero_grad, entropy, seed=share.number)
        share.batches += make_batches(
            share.trees, self._context, self._settings, keep=self._keep(), first=first
        )
        share.trees = []

    def _keep(self) -> Keep:
        """What may be kept of the images of the next packs, beside those that are not learnt from yet."""
        used = kept_patches(batch.pack for share in self._shares for batch in share.batches)
        return replace(keep_features(self._context, self._settings), used=used)

    def _learn(self, *, final: bool) -> None:
        """Learn from the packs of the first share that is not done; of the next ones when that is."""
        settings = self._settings
        may_step = settings.old_logprobs == "sampler"
        while self._done < len(self._shares):
            share = self._shares[self._done]
            if self._mixer.waits and share.missing and not final:
                return
            objective = self._mixer.objective(self._objective, share.counts)
            for batch in share.batches:
                self._trainer.add(
                    batch,
                    objective,
                    temperature=settings.temperature,
                    entropy_gradient=self._entropy_gradient,
                )
            share.begun, share.batches = share.begun or bool(share.batches), []
            is_last = self._done == len(self._shares) - 1
            if not final and (share.missing or is_last or not may_step):
                return
            if self._mixer.add_demonstrations(self._trainer, share.counts) or share.begun:
                result = self._trainer.apply(
                    average=self._mixer.average,
                    max_new_tokens=settings.max_new_tokens,
                    zero_grad=ZeroGradCounts.of(share.zero_grad),
                )
                self._results.append(result)
            self._done += 1


def make_batches(
    trees: Sequence[Tree], context: GrpoContext, settings: Grpo, *, keep: Keep = NONE, first: bool = False
) -> list[Batch]:
    """This rank's packs of trees within the token budget, with logprobs; all ranks pass the same trees.

    `first`: of the first optimiser step, see `with_logprobs`.
    """
    trees = [tree for tree in trees if tree.branches]
    if not trees:
        return []
    world = context.vlm.world
    own = [trees[i] for i in own_share([tree.num_tokens for tree in trees], world)]
    packs = packs_in_step(own, context.chat, budget=settings.pack_tokens, world=world, keep=keep)
    return with_logprobs(packs, context, settings, first=first)


def keep_features(context: GrpoContext, settings: Grpo) -> Keep:
    """For how many patches the output of a frozen tower is kept: none where packs pass only once."""
    many_passes = settings.optimizer_steps > 1 or context.reference is not None
    return Keep(patches=affordable_patches(context.vlm, context.feature_bytes)) if many_passes else NONE


def with_logprobs(
    packs: Sequence[Pack], context: GrpoContext, settings: Grpo, *, first: bool = False
) -> list[Batch]:
    """The packs with old and reference logprobs where the loss needs them; all ranks in step.

    The policy is still that of the rollout step's beginning in its only optimiser step, and in the `first` of
    several: there old logprobs by the policy are those of the update itself, and need no pass.
    """
    nothing: Sequence[torch.Tensor | None] = [None] * len(packs)
    old, reference, teacher = nothing, nothing, nothing
    if settings.optimizer_steps > 1:
        if settings.old_logprobs == "policy" and not first:
            old = logprobs_of(context.vlm, packs, temperature=settings.temperature)
        elif settings.old_logprobs == "sampler":
            old = [pack.sampler_logprobs for pack in packs]
    if context.reference is not None:
        own = [replace(pack, routes=None) for pack in packs]  # it is a policy of its own, router included
        reference = logprobs_of(context.reference, own, temperature=settings.temperature)
    if context.teacher is not None:
        teacher = context.teacher.logprobs(packs, temperature=settings.temperature)
    return [
        Batch(pack=p, old_logprobs=o, ref_logprobs=r, teacher_logprobs=t)
        for p, o, r, t in zip(packs, old, reference, teacher, strict=True)
    ]


def make_objective(settings: Grpo, cap: float | None = None, entropy_weight: float = 0.0) -> Objective:
    """The policy loss of a batch, and the sum of differences between the sampler's and the policy's logprobs.

    `cap` bounds the importance weights that correct for those differences; None: no correction.
    `entropy_weight` is that of the entropy bonus, which needs scores whose entropy has a gradient.
    """

    def objective(batch: Batch, scores: Scores) -> LossSums:
        device = scores.logprobs.device
        sums = policy_loss(inputs_of(batch, scores, cap, entropy_weight), settings)
        if batch.pack.sampler_logprobs is None:
            return sums
        gaps = (scores.logprobs.detach() - batch.pack.sampler_logprobs.to(device)).abs()
        return replace(
            sums,
            sums={**sums.sums, "sampler_gap": gaps.sum()},
            maxima={**sums.maxima, "sampler_gap_max": gaps.max()},
        )

    return objective
