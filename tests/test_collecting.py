"""The places of groups in a step: those of a step that waits for all, as soon as they are certain."""

import itertools

import pytest

from conftest import make_problem
from rlcs.recipe.stages import Grpo
from rlcs.records import Grade, Rollout, StopReason
from rlcs.train.collecting import StepGroups
from rlcs.train.groups import make_group, zero_variance


def group(chat, name, rewards, settings):
    problem = make_problem(name, sizes=())
    rollouts = [
        Rollout(problem_id=name, index=i, ids=(30,), logprobs=(-1.0,), stop=StopReason.EOS, seed=i, text="t")
        for i in range(len(rewards))
    ]
    grades = [Grade(reward=r, correct=r == 1.0) for r in rewards]
    return make_group(problem, chat.prompt(problem), rollouts, grades, settings)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dynamic", [0, 1])
def test_in_any_order_of_arrival_a_group_has_the_place_of_the_complete_step(chat, dynamic, steps):
    settings = Grpo(
        prompts_per_step=4, group_size=2, dynamic_sampling=dynamic, optimizer_steps=steps, max_new_tokens=4
    )
    mixed, alike = [1.0, 0.0], [1.0, 1.0]
    first = [group(chat, f"p{i}", r, settings) for i, r in enumerate((mixed, alike, mixed, alike))]
    second = [group(chat, f"q{i}", r, settings) for i, r in enumerate((alike, mixed))] if dynamic else []
    expected = first
    if dynamic:
        names = ["p0", "p2", "q1", "p1"]  # those with two rewards, then others up to the size of the step
        by_name = {g.problem.id: g for g in (*first, *second)}
        expected = [by_name[name] for name in names]
    size = 4 // steps
    for order in itertools.permutations(range(4)):
        found = StepGroups(settings)
        found.groups = [None] * 4
        places = {}
        for index in order:
            found.groups[index] = first[index]
            for place, placed in found.newly_placed():
                assert placed.problem.id not in places, "nothing is learnt twice"
                places[placed.problem.id] = place // size
        assert len(places) == (2 if dynamic else 4)
        found.groups += second
        found.complete = True
        for place, placed in found.newly_placed():
            assert placed.problem.id not in places
            places[placed.problem.id] = place // size
        assert found.chosen == expected
        assert places == {g.problem.id: place // size for place, g in enumerate(expected)}


def test_a_place_may_wait_for_the_groups_before(chat):
    settings = Grpo(prompts_per_step=3, group_size=2, dynamic_sampling=1, optimizer_steps=3, max_new_tokens=4)
    found = StepGroups(settings)
    found.groups = [None, group(chat, "b", [0.0, 1.0], settings), None]
    assert found.newly_placed() == [], "the first may come before it, or have equal rewards"
    found.groups[0] = group(chat, "a", [1.0, 1.0], settings)
    assert zero_variance(found.groups[0])
    [(place, placed)] = found.newly_placed()
    assert (place, placed.problem.id) == (0, "b")
    assert found.missing == 2


def test_a_place_need_not_be_known_where_the_optimiser_step_is(chat):
    """Two steps of four places; of five groups that come first, all but one belong to a certain one."""
    settings = Grpo(prompts_per_step=8, group_size=2, dynamic_sampling=1, optimizer_steps=2, max_new_tokens=4)
    found = StepGroups(settings)
    found.groups = [None] * 8
    for index in (1, 2, 3, 4, 7):
        found.groups[index] = group(chat, f"p{index}", [0.0, 1.0], settings)
    placed = {g.problem.id: place // 4 for place, g in found.newly_placed()}
    assert placed == {"p1": 0, "p2": 0, "p3": 0, "p7": 1}, "p4 is the fourth or the fifth"
    found.groups[0] = group(chat, "p0", [0.0, 0.0], settings)
    assert [(place // 4, g.problem.id) for place, g in found.newly_placed()] == [(0, "p4")]
