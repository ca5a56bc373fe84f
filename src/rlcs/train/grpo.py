"""Stage two: group-relative policy optimisation with a rule-checked reward (arXiv 2402.03300).

The group is the unit of work end to end: sampled, graded, packed and learnt from together.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch

from rlcs.data.stream import ProblemStream
from rlcs.engines.base import Engine
from rlcs.errors import DataError, TrainingError, out_of_memory_in
from rlcs.generation.judge import Judge
from rlcs.grading.reward import Grader, advice
from rlcs.model.chat import Chat
from rlcs.model.parity_check import require_agreement
from rlcs.model.policy import Scores
from rlcs.model.vlm import Vlm
from rlcs.progress import Screen
from rlcs.recipe.stages import Grpo
from rlcs.records import Grade, Group, Problem, Prompt, Rollout, Sampling, Tree
from rlcs.signals import StopFlag
from rlcs.train.batching import guessed_tokens, own_share, packs_in_step, shared
from rlcs.train.clock import Clock
from rlcs.train.groups import make_group, tree_of, zero_variance
from rlcs.train.losses import LossInputs, LossSums, policy_loss, truncated_importance
from rlcs.train.run_dir import RunDir
from rlcs.train.trainer import Batch, Objective, StepResult, Trainer, ZeroGradCounts, combined, logprobs_of


@dataclass(frozen=True, kw_only=True)
class GrpoContext:
    """The models and services of a step: policy, reference (None without KL), chat format, engine, grader.

    A `judge` is one that the grader asks, on rank 0: it starts on each group as soon as that is sampled.

    `importance_cap` bounds the weights that correct for differences between the engine's logprobs and the
    policy's; None: no correction. Under `torchrun` all ranks call the methods together: each does its share
    of the work, and all get all results.
    """

    vlm: Vlm
    reference: Vlm | None
    chat: Chat
    engine: Engine
    grader: Grader
    judge: Judge | None = None
    importance_cap: float | None = None

    def prompts(self, problems: Sequence[Problem]) -> list[Prompt | DataError]:
        """The prompt of each problem, or the error for which it has none."""
        return shared(self.chat.prompts, problems, guessed_tokens, self.vlm.world)

    def sample(
        self, problems: Sequence[Problem], prompts: Sequence[Prompt], sampling: Sampling, *, step: int
    ) -> list[tuple[Rollout, ...]]:
        """The rollouts of each problem's prompt."""
        sample = partial(self.engine.sample, sampling=sampling, step=step)
        if self.judge is not None:
            sample = partial(sample, on_group=partial(_start_judge, self.judge, problems))
        return shared(sample, prompts, lambda prompt: len(prompt.ids), self.vlm.world)

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """The grade of each (problem, response)."""
        return shared(self.grader.grade, answers, lambda answer: len(answer[1]), self.vlm.world)


def _start_judge(judge: Judge, problems: Sequence[Problem], group: Sequence[Rollout]) -> None:
    by_id = {problem.id: problem for problem in problems}
    judge.start([(by_id[rollout.problem_id], rollout.text) for rollout in group])


def frozen_copy(vlm: Vlm) -> Vlm:
    """A copy of the policy without gradients, as the reference; to be made before the policy is sharded."""
    return replace(vlm, model=copy.deepcopy(vlm.model).requires_grad_(False))


def with_reference(vlm: Vlm, spread: Callable[[Vlm], Vlm]) -> tuple[Vlm, Vlm]:
    """The policy and the reference, both spread over the ranks.

    With adapters the reference is the policy's own weights with the adapters off, else a frozen copy.
    """
    if vlm.adapter is None:
        with out_of_memory_in("loading"):
            reference = spread(frozen_copy(vlm))
        return spread(vlm), reference
    policy = spread(vlm)
    return policy, replace(policy, reference_mode=True)


def train(
    context: GrpoContext,
    problems: Sequence[Problem],
    settings: Grpo,
    *,
    run: RunDir,
    screen: Screen,
    stop: StopFlag,
) -> None:
    """Train from the newest checkpoint of the run, if there is one; `run` saves the trained model."""
    total = settings.steps * settings.optimizer_steps
    trainer = Trainer(context.vlm, settings.optimizer, steps=total, max_bad_steps=settings.max_bad_steps)
    stream = ProblemStream(problems, seed=run.seed)
    sampling = context.chat.sampling(
        n=settings.group_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        seed=run.seed,
    )
    first = run.resume(trainer, stream, steps=settings.steps)
    for step in range(first, settings.steps):
        measured = run.validate(step, screen=screen, stop=stop)
        clock = Clock()
        with clock("rollout"):
            if not measured:  # else the engine has these weights already
                context.engine.sync()
        cursor = stream.state()
        groups, skipped = collect(context, stream, settings, sampling, step=step, clock=clock)
        with clock("rollout"):
            context.engine.rest()
        if not any(grade.scored for group in groups for grade in group.grades):
            stream.restore(cursor)
            _stop_unscored(run, groups, step=step, first=first)
        if step == first:
            own = groups[context.vlm.world.rank % len(groups)]
            require_agreement(context.vlm, context.chat, tree_of(own, keep_unscored=True))
        results = learn(trainer, context, groups, settings, clock=clock)
        run.zero_variance_steps = run.zero_variance_steps + 1 if all(map(zero_variance, groups)) else 0
        _require_signal(run.zero_variance_steps, settings.max_zero_variance_steps)
        result = combined(results) if results else None
        values = run.keep_rollouts(step + 1, groups) | {"bad_rows": float(skipped)}
        run.after_step(result, step=step + 1, values=values, seconds=clock.seconds, screen=screen, stop=stop)
    run.validate(settings.steps, screen=screen, stop=stop)
    run.finish(screen)


def collect(
    context: GrpoContext,
    stream: ProblemStream[Problem],
    settings: Grpo,
    sampling: Sampling,
    *,
    step: int,
    clock: Clock,
) -> tuple[list[Group], int]:
    """Sample and grade the groups of one step; also returns how many problems were skipped.

    DAPO (arXiv 2503.14476, section 3.2) samples until every group has two different rewards; here
    for at most `dynamic_sampling` more rounds. A problem that cannot become a
    prompt is skipped, and the next one takes its place.
    """
    groups: list[Group] = []
    times_sampled: Counter[str] = Counter()
    skipped = 0
    for _ in range(1 + settings.dynamic_sampling):
        missing = settings.prompts_per_step - sum(not zero_variance(group) for group in groups)
        if missing <= 0:
            break
        problems, prompts, bad = take_prompts(stream, context.prompts, missing)
        skipped += bad
        prompts = number_repeats(prompts, times_sampled)
        with clock("rollout"):
            rollouts = context.sample(problems, prompts, sampling, step=step)
        with clock("grade"):
            answers = [(p, r.text) for p, group in zip(problems, rollouts, strict=True) for r in group]
            grades = iter(context.grade(answers))
        for problem, prompt, group in zip(problems, prompts, rollouts, strict=True):
            groups.append(make_group(problem, prompt, group, [next(grades) for _ in group], settings))
    if settings.dynamic_sampling:
        groups = sorted(groups, key=zero_variance)[: settings.prompts_per_step]
    return groups, skipped


def learn(
    trainer: Trainer, context: GrpoContext, groups: Sequence[Group], settings: Grpo, *, clock: Clock
) -> list[StepResult]:
    """Take the optimiser steps of one rollout step, each on its share of the groups.

    Without a KL penalty a group whose rewards are all equal has a gradient of exactly zero: it is not
    computed, but its tokens still count in the mean (not in `micro_batch`, whose mean is of each
    computed pack).
    """
    size = -(-len(groups) // settings.optimizer_steps)
    planned: list[tuple[list[Batch], ZeroGradCounts]] = []
    with clock("reference"):
        for start in range(0, len(groups), size):
            share = groups[start : start + size]
            known_zero = [zero_variance(group) and not settings.kl.active for group in share]
            trees = [tree_of(g) for g, zero in zip(share, known_zero, strict=True) if not zero]
            left_out = [tree_of(g) for g, zero in zip(share, known_zero, strict=True) if zero]
            planned.append((make_batches(trees, context, settings), ZeroGradCounts.of(left_out)))
    objective = make_objective(settings, context.importance_cap)
    with clock("update"):
        return [
            trainer.step(
                batches,
                objective,
                average=settings.loss_average,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                zero_grad=counts,
            )
            for batches, counts in planned
            if batches
        ]


def take_prompts(
    stream: ProblemStream[Problem],
    prompts_of: Callable[[Sequence[Problem]], Sequence[Prompt | DataError]],
    count: int,
) -> tuple[list[Problem], list[Prompt], int]:
    """The next `count` problems that can be prompts, their prompts, and how many cannot.

    Raises DataError when none of the next `count` can, which a few bad rows do not explain.
    """
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    skipped = 0
    while len(problems) < count:
        taken = stream.take(count - len(problems))
        for problem, prompt in zip(taken, prompts_of(taken), strict=True):
            if isinstance(prompt, Prompt):
                problems.append(problem)
                prompts.append(prompt)
            else:
                skipped, error = skipped + 1, prompt
        if skipped >= count and not problems:
            raise error
    return problems, prompts, skipped


def number_repeats(prompts: Sequence[Prompt], times_sampled: Counter[str]) -> list[Prompt]:
    """The prompts, each with the number of times that its problem was sampled before in this step.

    Where there are few problems a step may sample one twice, and equal seeds would give equal answers. Adds
    these prompts to the counts in `times_sampled`.
    """
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, repeat=times_sampled[prompt.problem_id]))
        times_sampled[prompt.problem_id] += 1
    return numbered


def make_batches(trees: Sequence[Tree], context: GrpoContext, settings: Grpo) -> list[Batch]:
    """Packs within the token budget, with old and reference logprobs where the loss needs them.

    With one optimiser step a rollout step the policy is the one that sampled, so the ratio's base
    is the policy itself and needs no pass.
    """
    trees = [tree for tree in trees if tree.branches]
    if not trees:
        return []
    world = context.vlm.world
    own = [trees[i] for i in own_share([tree.num_tokens for tree in trees], world)]
    packs = packs_in_step(own, context.chat, budget=settings.pack_tokens, world=world)
    old: Sequence[torch.Tensor | None] = [None] * len(packs)
    reference: Sequence[torch.Tensor | None] = [None] * len(packs)
    if settings.optimizer_steps > 1:
        if settings.old_logprobs == "policy":
            old = logprobs_of(context.vlm, packs, temperature=settings.temperature)
        else:
            old = [pack.sampler_logprobs for pack in packs]
    if context.reference is not None:
        reference = logprobs_of(context.reference, packs, temperature=settings.temperature)
    return [
        Batch(pack=p, old_logprobs=o, ref_logprobs=r) for p, o, r in zip(packs, old, reference, strict=True)
    ]


def make_objective(settings: Grpo, cap: float | None = None) -> Objective:
    """The policy loss of a batch, and the sum of differences between the sampler's and the policy's logprobs.

    `cap` bounds the importance weights that correct for those differences; None: no correction.
    """

    def objective(batch: Batch, scores: Scores) -> LossSums:
        device = scores.logprobs.device
        now = scores.logprobs.detach()
        old = now if batch.old_logprobs is None else batch.old_logprobs.to(device)
        sampler = batch.pack.sampler_logprobs
        sampler = None if sampler is None else sampler.to(device)
        inputs = LossInputs(
            logprobs=scores.logprobs,
            old_logprobs=old,
            advantages=batch.pack.weights.to(device),
            sequence=batch.pack.sequence.to(device),
            ref_logprobs=batch.ref_logprobs,
            importance=None if sampler is None or cap is None else truncated_importance(old, sampler, cap),
        )
        sums = policy_loss(inputs, settings)
        if sampler is None:
            return sums
        gaps = (now - sampler).abs()
        return replace(
            sums,
            sums={**sums.sums, "sampler_gap": gaps.sum()},
            maxima={**sums.maxima, "sampler_gap_max": gaps.max()},
        )

    return objective


def _stop_unscored(run: RunDir, groups: Sequence[Group], *, step: int, first: int) -> NoReturn:
    """Keep the steps before this one, and end the run with the reason why no answer is scored."""
    run.keep_rollouts(step + 1, groups)
    if step > first:
        run.save(step)
    reasons = Counter(grade.why for group in groups for grade in group.grades)
    [(why, count)] = reasons.most_common(1)
    raise TrainingError(
        f"none of the {reasons.total():,} answers of step {step + 1} is scored; {count:,} of them: {why}",
        where="grpo.reward",
        fix=advice(why),
    )


def _require_signal(zero_variance_steps: int, limit: int) -> None:
    if zero_variance_steps >= limit:
        raise TrainingError(
            f"no group had two different rewards in {zero_variance_steps} steps in a row: "
            "nothing can be learnt",
            fix="look at rollouts/: are answers boxed, and is the task neither too hard nor too easy?",
        )
