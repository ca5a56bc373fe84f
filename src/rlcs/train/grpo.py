"""Stage two: group-relative policy optimisation with a rule-checked reward (arXiv 2402.03300).

The group is the unit of work end to end: sampled, graded, packed and learnt from together. With servers on
other GPUs (`GrpoContext.overlap`) sampling and learning go on at the same time:

- `on_policy`: the groups of a step are graded, scored by the reference and learnt from as they arrive, all
  by the weights of the step's beginning: the gradient is that of a step that waits for all of them, but for
  the order of summation. So the long answers are sampled while the others are learnt from.
- `one_step_off`: besides, once a step is sampled, the next one begins to be, by the weights of before this
  step's update: the policy that learns from it is one update ahead, never more. `importance` (truncated) is
  the policy at the step's beginning over the sampler, so it corrects for one update as well as for the
  engine's kernels; the clipped ratio is the policy now over that at the step's beginning. Further rounds of
  dynamic sampling use the newest weights. What is sampled in advance is in no checkpoint: a resumed run
  samples the same prompts with the same seeds, by the newest weights. Before a measurement, which needs the
  engine, nothing is sampled in advance.

The seconds of `rollout` are those in which the trainer had nothing to do but wait for groups. A stop signal
ends a step that is being sampled at once, as long as it has not changed the weights: it is taken again.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from rlcs.data.difficulty import stream_of
from rlcs.data.stream import Together
from rlcs.errors import out_of_memory_in
from rlcs.model.parity_check import require_agreement
from rlcs.model.vlm import Vlm
from rlcs.progress import Screen
from rlcs.recipe.stages import Grpo
from rlcs.records import Group, Problem
from rlcs.signals import StopFlag
from rlcs.train.clock import Clock
from rlcs.train.collecting import Collector
from rlcs.train.context import GrpoContext
from rlcs.train.earlier import EarlierAnswers
from rlcs.train.engine_check import EngineCheck
from rlcs.train.entropy import EntropyBonus
from rlcs.train.groups import outcome, tree_of
from rlcs.train.learning import Learner
from rlcs.train.mixing import Mixer
from rlcs.train.run_dir import RunDir
from rlcs.train.stops import ScoreWatch, require_signal, stop_unscored
from rlcs.train.trainer import Trainer, combined


def frozen_copy(vlm: Vlm, dtype: torch.dtype | None = None) -> Vlm:
    """A copy of the policy without gradients, as the reference; to be made before the policy is sharded.

    `dtype` is the number format of its weights, if not the policy's; buffers stay exact.
    """
    model = copy.deepcopy(vlm.model).requires_grad_(False)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype or weight.dtype)
    return replace(vlm, model=model)


def with_reference(
    vlm: Vlm, spread: Callable[[Vlm], Vlm], *, dtype: torch.dtype | None = None
) -> tuple[Vlm, Vlm]:
    """The policy and the reference, both spread over the ranks.

    With adapters the reference is the policy's own weights with the adapters off, else a frozen copy.
    """
    if vlm.adapter is None:
        with out_of_memory_in("loading"):
            reference = spread(frozen_copy(vlm, dtype))
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
    stream = stream_of(problems, settings.order, seed=run.seed, steps=settings.steps)
    sampling = context.chat.sampling(
        n=settings.group_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        seed=run.seed,
    )
    check = EngineCheck(context, problems, settings, say=lambda line: screen.say(f"{run.name}: {line}"))
    earlier = EarlierAnswers(settings, len(problems) if context.drafts else 0)
    collector = Collector(context, stream, settings, sampling, check=check, earlier=earlier)
    mixer = Mixer(context, settings, seed=run.seed)
    first = run.resume(trainer, Together(stream, mixer.demonstrations), steps=settings.steps)
    earlier.read(run.path, step=first, world=context.vlm.world)
    bonus, watch, unchecked = EntropyBonus(settings.entropy, run.carried), ScoreWatch(run), True
    for step in range(first, run.until or settings.steps):
        if run.validate(step, screen=screen, stop=stop):
            collector.synced(step)
        clock, cursor = Clock(), stream.state()
        learner = Learner(trainer, context, settings, clock, mixer.begin(step), entropy_weight=bonus.weight)
        for found in collector.collect(step, clock):
            if found.complete and not any(grade.scored for group in found.arrived for grade in group.grades):
                stream.restore(cursor)
                stop_unscored(run, found.chosen, step=step, first=first)
            if unchecked and found.arrived:
                _check_packing(context, found.arrived, settings.temperature)
                unchecked = False
            learner.add(found.newly_placed())
            if not found.complete:
                learner.advance()
                if not learner.has_stepped and context.vlm.world.agree(stop):
                    stream.restore(cursor)
                    run.stop_in_step(step, stop)
        groups, signals = found.chosen, stream.observe(map(outcome, found.arrived))
        if context.overlap == "one_step_off" and not run.is_last_or_measured(step + 1):
            collector.request_ahead(step + 1, clock)
        results = learner.finish()
        if not mixer.learns_without_reward:
            require_signal(run, groups, settings)
        result = combined(results) if results else None
        watch.add(groups)
        values = run.keep_rollouts(step + 1, groups) | {"bad_rows": float(found.skipped)}
        values |= signals | check.values() | mixer.values | bonus.after(result)
        if context.overlap == "one_step_off":
            values["staleness"] = fmean(group.staleness for group in groups)
        run.after_step(result, step=step + 1, values=values, seconds=clock.seconds, screen=screen, stop=stop)
        watch.require(groups, step=step + 1)
    run.conclude(screen, stop)


def _check_packing(context: GrpoContext, groups: Sequence[Group], temperature: float) -> None:
    """Compare packed trees of some groups with plain sequences, on every rank its own."""
    world = context.vlm.world
    own = groups[world.rank :: world.size] or groups[-1:]
    trees = [tree_of(group, keep_unscored=True) for group in own]
    require_agreement(context.vlm, context.chat, trees, temperature=temperature)
