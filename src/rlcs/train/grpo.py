"""Stage two: group-relative policy optimisation with a rule-checked reward (arXiv 2402.03300).

The group is the unit of work end to end: sampled, graded, packed and learnt from together.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from rlcs.data import ProblemStream
from rlcs.distributed import ALONE, World
from rlcs.engines.base import Engine
from rlcs.errors import DataError, TrainingError
from rlcs.grading import GradePool, health
from rlcs.model.chat import Chat
from rlcs.model.loading import Vlm
from rlcs.model.parity_check import require_agreement
from rlcs.model.policy import Scores
from rlcs.progress import Screen
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Grpo
from rlcs.records import Branch, Grade, Group, Problem, Prompt, Rollout, Sampling, StopReason, Tree, to_row
from rlcs.signals import StopFlag
from rlcs.train.batching import guessed_tokens, own_share, packs_in_step
from rlcs.train.health import SIGNS
from rlcs.train.losses import (
    LossInputs,
    LossSettings,
    LossSums,
    advantages,
    has_zero_variance,
    overlong_penalty,
    policy_loss,
    truncated_importance,
)
from rlcs.train.run_dir import Clock, RunDir
from rlcs.train.trainer import Batch, Counts, Objective, StepResult, Trainer, logprobs_of

log = logging.getLogger("rlcs")


@dataclass(frozen=True, kw_only=True)
class GrpoContext:
    """Who takes part in a step: policy, reference (None without KL), chat format, engine, graders.

    `rollout` says how far the engine's logprobs may be from the policy's, and how that is corrected.
    """

    vlm: Vlm
    reference: Vlm | None
    chat: Chat
    engine: Engine
    pool: GradePool
    rollout: Rollouts = field(default_factory=Rollouts)


def frozen_copy(vlm: Vlm) -> Vlm:
    """The reference: the policy as it is now, without gradients; make it before the policy is spread."""
    model = copy.deepcopy(vlm.model).requires_grad_(False)
    return replace(vlm, model=model)


def with_reference(vlm: Vlm, spread: Callable[[Vlm], Vlm]) -> tuple[Vlm, Vlm]:
    """The policy and the reference, both spread over the ranks.

    With adapters the reference is the policy's own weights with the adapters off, else a frozen copy.
    """
    if vlm.adapter is None:
        reference = spread(frozen_copy(vlm))
        return spread(vlm), reference
    policy = spread(vlm)
    return policy, replace(policy, reference_mode=True)


def train(
    actors: GrpoContext,
    problems: Sequence[Problem],
    settings: Grpo,
    *,
    folder: RunDir,
    screen: Screen,
    stop: StopFlag,
) -> None:
    """Train, resuming from the folder's newest checkpoint; the result is `folder/final`."""
    total = settings.steps * settings.optimizer_steps
    trainer = Trainer(actors.vlm, settings.optimizer, steps=total, max_bad_steps=settings.max_bad_steps)
    stream = ProblemStream(problems, seed=folder.seed)
    sampling = actors.chat.sampling(
        n=settings.group_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        seed=folder.seed,
    )
    first = folder.resume(trainer, stream)
    for step in range(first, settings.steps):
        clock = Clock()
        with clock("rollout"):
            actors.engine.sync()
        groups, skipped = collect(actors, stream, settings, sampling, step=step, clock=clock)
        if step == first:
            tree = tree_of(groups[actors.vlm.world.rank % len(groups)], keep_unscored=True)
            require_agreement(actors.vlm, actors.chat, tree)
        outcomes = learn(trainer, actors, groups, settings, clock=clock)
        folder.zero_variance_steps = folder.zero_variance_steps + 1 if all(map(flat, groups)) else 0
        _require_signal(folder.zero_variance_steps, settings)
        folder.journal(step + 1, [to_row(each) for group in groups for each in group.samples])
        folder.note_problems(group.problem for group in groups)
        report = folder.report(
            outcomes[0] if outcomes else None,
            step=step + 1,
            steps=settings.steps,
            values=measure(groups) | averaged(outcomes) | {"bad_rows": float(skipped)},
            seconds=clock.seconds,
        )
        warn_of_gap(report.values, actors.rollout.alarm, screen)
        folder.after_step(trainer, stream, report, screen=screen, stop=stop)
    folder.finish(trainer)


def warn_of_gap(values: Mapping[str, float], most: float, screen: Screen) -> None:
    """Warn when the engine's logprobs are far from the policy's: it samples from another model."""
    sign = next(sign for sign in SIGNS if sign.key == "sampler_gap")
    if (gap := values.get(sign.key, 0.0)) > most:
        text = f"{sign.name}: {sign.message(gap, most)}"
        log.warning(text)
        screen.say(f"warning: {text}")


def _require_signal(zero_variance_steps: int, settings: Grpo) -> None:
    if zero_variance_steps >= settings.max_zero_variance_steps:
        raise TrainingError(
            f"no group had two different rewards in {zero_variance_steps} steps in a row: "
            "nothing can be learnt",
            fix="look at rollouts/: are answers boxed, and is the task neither too hard nor too easy?",
        )


def collect(
    actors: GrpoContext,
    stream: ProblemStream[Problem],
    settings: Grpo,
    sampling: Sampling,
    *,
    step: int,
    clock: Clock,
) -> tuple[list[Group], int]:
    """The groups of one step, sampled and graded, and how many problems were skipped on the way.

    Every rank asks, samples and grades its share, and gets the groups of all.

    DAPO (arXiv 2503.14476, section 3.2) samples until every group has two different rewards; here
    at most `dynamic_sampling` more rounds, then what there is. A problem that cannot become a
    prompt is skipped, and the next one takes its place.
    """
    world = actors.vlm.world
    groups: list[Group] = []
    asked_before: Counter[str] = Counter()
    skipped = 0
    for _ in range(1 + settings.dynamic_sampling):
        wanted = settings.prompts_per_step - sum(not flat(group) for group in groups)
        if wanted <= 0:
            break
        problems, prompts, bad = take_prompts(stream, actors.chat, wanted, world)
        skipped += bad
        prompts = tell_repeats(problems, prompts, asked_before)
        with clock("rollout"):
            rollouts = actors.engine.sample(list(prompts.values()), sampling, step=step)
        with clock("grade"):
            asked = [problems[place] for place in prompts]
            flat_pairs = [(p, r.text) for p, rs in zip(asked, rollouts, strict=True) for r in rs]
            grades = iter(actors.pool.grade(flat_pairs))
            own = {}
            for (place, prompt), members in zip(prompts.items(), rollouts, strict=True):
                scored = tuple(next(grades) for _ in members)
                own[place] = make_group(problems[place], prompt, members, scored, settings)
            made = {place: group for some in world.gather(own) for place, group in some.items()}
            groups += [made[place] for place in sorted(made)]
    if settings.dynamic_sampling:
        groups.sort(key=flat)
        groups = groups[: settings.prompts_per_step]
    return groups, skipped


def take_prompts(
    stream: ProblemStream[Problem], chat: Chat, count: int, world: World = ALONE
) -> tuple[list[Problem], dict[int, Prompt], int]:
    """The next `count` problems that can be prompts, this rank's prompts by place, and how many cannot.

    Raises DataError when none of the next `count` can: then it is not the rows that are at fault.
    """
    problems: list[Problem] = []
    prompts: dict[int, Prompt] = {}
    skipped = 0
    while len(problems) < count:
        taken = stream.take(count - len(problems))
        own: dict[int, Prompt] = {}
        errors: dict[int, DataError] = {}
        for index in own_share([guessed_tokens(problem) for problem in taken], world):
            try:
                own[index] = chat.prompt(taken[index])
            except DataError as error:
                errors[index] = error
        bad = {index: error for some in world.gather(errors) for index, error in some.items()}
        for index, problem in enumerate(taken):
            if index in own:
                prompts[len(problems)] = own[index]
            if index not in bad:
                problems.append(problem)
        skipped += len(bad)
        if skipped >= count and not problems:
            raise bad[max(bad)]
    return problems, prompts, skipped


def tell_repeats(
    problems: Sequence[Problem], prompts: Mapping[int, Prompt], asked_before: Counter[str]
) -> dict[int, Prompt]:
    """The prompts, each knowing how often this step asked its problem before; counts these in too.

    Where there are few problems a step may deal one twice, and equal seeds would give equal answers. Every
    rank counts the problems of all.
    """
    repeats = []
    for problem in problems:
        repeats.append(asked_before[problem.id])
        asked_before[problem.id] += 1
    return {place: replace(prompt, repeat=repeats[place]) for place, prompt in prompts.items()}


def make_group(
    problem: Problem,
    prompt: Prompt,
    rollouts: Sequence[Rollout],
    grades: Sequence[Grade],
    settings: Grpo,
) -> Group:
    """Shape the rewards and compare the members with each other."""
    rewards = [shaped_reward(r, g, settings) for r, g in zip(rollouts, grades, strict=True)]
    return Group(
        problem=problem,
        prompt=prompt,
        rollouts=tuple(rollouts),
        grades=tuple(grades),
        advantages=advantages(rewards, settings.advantage),
    )


def shaped_reward(rollout: Rollout, grade: Grade, settings: Grpo) -> float | None:
    """The grade's reward less the overlong penalty; None leaves the rollout out of the loss."""
    overlong = settings.overlong
    if grade.reward is None or rollout.stop is StopReason.ERROR:
        return None
    if overlong.drop_truncated and rollout.stop is StopReason.LENGTH:
        return None
    length, limit = len(rollout.ids), settings.max_new_tokens
    return grade.reward + overlong_penalty(length, limit, overlong.buffer, overlong.penalty)


def flat(group: Group) -> bool:
    """Whether no member did better than another: without a KL penalty the gradient is exactly zero."""
    return has_zero_variance(group.advantages)


def tree_of(group: Group, *, keep_unscored: bool = False) -> Tree:
    """The prompt once, one branch a scored rollout, each token weighted by the advantage."""
    branches = [
        Branch(ids=r.ids, weights=(a or 0.0,) * len(r.ids), logprobs=r.logprobs)
        for r, a in zip(group.rollouts, group.advantages, strict=True)
        if r.ids and (a is not None or keep_unscored)
    ]
    return Tree(prompt=group.prompt, branches=tuple(branches))


def learn(
    trainer: Trainer, actors: GrpoContext, groups: Sequence[Group], settings: Grpo, *, clock: Clock
) -> list[StepResult]:
    """The optimiser steps of one rollout step, each on its share of the groups, which ranks share anew.

    Without a KL penalty a flat group has a gradient of exactly zero: it is not computed, but its
    tokens still count in the mean (not in `micro_batch`, whose mean is of each computed pack).
    """
    size = -(-len(groups) // settings.optimizer_steps)
    shares = [groups[i : i + size] for i in range(0, len(groups), size)]
    keep_flat = settings.kl.active
    planned: list[tuple[list[Batch], Counts]] = []
    with clock("reference"):
        for share in shares:
            active = [group for group in share if keep_flat or not flat(group)]
            trees = [tree for tree in map(tree_of, active) if tree.branches]
            own = own_share([tree.num_tokens for tree in trees], actors.vlm.world)
            idle = [tree_of(group) for group in share if not keep_flat and flat(group)]
            also = Counts(
                tokens=sum(len(b.ids) for tree in idle for b in tree.branches),
                sequences=sum(len(tree.branches) for tree in idle),
            )
            batches = make_batches([trees[i] for i in own], actors, settings) if trees else []
            planned.append((batches, also))
    outcomes = []
    objective = make_objective(settings, actors.rollout.cap)
    with clock("update"):
        for batches, also in planned:
            if batches:
                outcomes.append(
                    trainer.step(
                        batches,
                        objective,
                        average=settings.loss_average,
                        temperature=settings.temperature,
                        max_new_tokens=settings.max_new_tokens,
                        also=also,
                    )
                )
    return outcomes


def make_batches(trees: Sequence[Tree], actors: GrpoContext, settings: Grpo) -> list[Batch]:
    """Packs within the token budget, with old and reference logprobs where the loss needs them.

    With one optimiser step a rollout step the policy is the one that sampled, so the ratio's base
    is the policy itself and needs no pass.
    """
    packs = packs_in_step(trees, actors.chat, budget=settings.pack_tokens, world=actors.vlm.world)
    old: Sequence[torch.Tensor | None] = [None] * len(packs)
    reference: Sequence[torch.Tensor | None] = [None] * len(packs)
    if settings.optimizer_steps > 1:
        if settings.old_logprobs == "policy":
            old = logprobs_of(actors.vlm, packs, temperature=settings.temperature)
        else:
            old = [p.sampler_logprobs for p in packs]
    if actors.reference is not None:
        reference = logprobs_of(actors.reference, packs, temperature=settings.temperature)
    return [
        Batch(pack=p, old_logprobs=o, ref_logprobs=r) for p, o, r in zip(packs, old, reference, strict=True)
    ]


def make_objective(settings: Grpo, cap: float | None = None) -> Objective:
    """The policy loss of a batch; also sums how far the sampler's logprobs are from the policy's.

    `cap` bounds the importance weights that correct for that; None: no correction.
    """
    loss_settings = LossSettings.from_recipe(settings)

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
        sums = policy_loss(inputs, loss_settings)
        if sampler is None:
            return sums
        gaps = (now - sampler).abs()
        return replace(
            sums,
            sums={**sums.sums, "sampler_gap": gaps.sum()},
            maxima={**sums.maxima, "sampler_gap_max": gaps.max()},
        )

    return objective


def measure(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts of one step looked like: averages over rollouts, shares between 0 and 1."""
    rollouts = [r for group in groups for r in group.rollouts]
    grades = [g for group in groups for g in group.grades]
    scored = [g for g in grades if g.reward is not None]
    count = max(1, len(rollouts))
    values = {
        "accuracy": sum(bool(g.correct) for g in scored) / max(1, len(scored)),
        "reward": sum(g.reward or 0.0 for g in scored) / max(1, len(scored)),
        "response_tokens": sum(len(r.ids) for r in rollouts) / count,
        "truncated": sum(r.stop is StopReason.LENGTH for r in rollouts) / count,
        "unscored": 1.0 - len(scored) / count,
        "zero_variance_groups": sum(flat(group) for group in groups) / max(1, len(groups)),
        "rollout_tokens": float(sum(len(r.ids) for r in rollouts)),
    }
    return values | health([r.text for r in rollouts])


def averaged(outcomes: Sequence[StepResult]) -> dict[str, float]:
    """Means over the optimiser steps of a rollout step (largest of what ends in `_max`).

    `sampler_gap` and its maximum are the first step's: later ones differ because the policy has moved on
    purpose.
    """
    values: dict[str, float] = {}
    for name in outcomes[0].values if outcomes else ():
        each = [outcome.values[name] for outcome in outcomes]
        values[name] = max(each) if name.endswith("_max") else sum(each) / len(each)
    for name in values.keys() & {"sampler_gap", "sampler_gap_max"}:
        values[name] = outcomes[0].values[name]
    return values
