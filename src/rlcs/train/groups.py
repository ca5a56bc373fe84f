"""Groups of rollouts: their shaped rewards, their advantages, and the trees that the trainer learns from."""

from collections.abc import Sequence
from dataclasses import replace

from rlcs.data.stream import Outcome
from rlcs.recipe.stages import Grpo
from rlcs.records import Grade, Group, Problem, Prompt, Rollout, StopReason
from rlcs.records.trees import Branch, Tree
from rlcs.train.losses import advantages, has_zero_variance, overlong_penalty


def make_group(
    problem: Problem, prompt: Prompt, rollouts: Sequence[Rollout], grades: Sequence[Grade], settings: Grpo
) -> Group:
    """Make a group of a problem's graded rollouts: shape their rewards and compute the advantages."""
    grades = with_length(rollouts, grades, settings.reward.length)
    rewards = [shaped_reward(r, g, settings) for r, g in zip(rollouts, grades, strict=True)]
    return Group(
        problem=problem,
        prompt=prompt,
        rollouts=tuple(rollouts),
        grades=tuple(grades),
        advantages=advantages(rewards, settings.advantage, k=settings.pass_k),
    )


def with_length(rollouts: Sequence[Rollout], grades: Sequence[Grade], weight: float) -> Sequence[Grade]:
    """Add the part `length` to the rewards of a group, if it has a weight.

    Kimi k1.5 (arXiv 2501.12599, section 2.3.3): from 0.5 for the shortest answer to -0.5 for the longest,
    in tokens, but never above 0 for a wrong answer; 0 for all where the lengths are equal.
    """
    lengths = [len(r.ids) for r, g in zip(rollouts, grades, strict=True) if g.scored]
    if not weight or not lengths:
        return grades
    shortest, spread = min(lengths), max(lengths) - min(lengths)
    added = []
    for rollout, grade in zip(rollouts, grades, strict=True):
        if grade.reward is not None:
            score = 0.5 - (len(rollout.ids) - shortest) / spread if spread else 0.0
            score = score if grade.correct else min(0.0, score)
            parts = {**grade.parts, "length": score}
            grade = replace(grade, reward=grade.reward + weight * score, parts=parts)
        added.append(grade)
    return added


def shaped_reward(rollout: Rollout, grade: Grade, settings: Grpo) -> float | None:
    """The grade's reward less the overlong penalty; None leaves the rollout out of the loss."""
    overlong, truncated = settings.overlong, rollout.stop is StopReason.LENGTH
    if grade.reward is None or rollout.stop is StopReason.ERROR or (overlong.drop_truncated and truncated):
        return None
    length, limit = len(rollout.ids), settings.max_new_tokens
    return grade.reward + overlong_penalty(length, limit, overlong.buffer, overlong.penalty)


def zero_variance(group: Group) -> bool:
    """Whether no rollout did better than another: without a KL penalty the gradient is exactly zero."""
    return has_zero_variance(group.advantages)


def outcome(group: Group) -> Outcome:
    """What a stream of problems learns from a group."""
    scored = [grade.correct for grade in group.grades if grade.correct is not None]
    signal = not zero_variance(group)
    return Outcome(problem_id=group.problem.id, answers=len(scored), right=sum(scored), signal=signal)


def tree_of(group: Group, *, keep_unscored: bool = False, merges: bool = False) -> Tree:
    """A tree of the prompt with one branch for each scored rollout, whose tokens weigh its advantage.

    With `merges` it is computed once what answers begin with alike, unless experts are to be replayed.
    """
    branches = [
        Branch(
            ids=r.ids,
            weights=(a or 0.0,) * len(r.ids),
            logprobs=r.logprobs,
            routes=None if r.routes is None else r.routes.last(len(r.ids) - 1),
        )
        for r, a in zip(group.rollouts, group.advantages, strict=True)
        if r.ids and (a is not None or keep_unscored)
    ]
    size = len(group.prompt.ids)
    whole = (
        r.routes for r in group.rollouts if r.routes is not None and len(r.routes) == size + len(r.ids) - 1
    )
    routes = next((found.first(size) for found in whole), None)
    merges &= all(rollout.routes is None for rollout in group.rollouts)
    return Tree(prompt=group.prompt, branches=tuple(branches), trunk_routes=routes, merges=merges)
