"""RL ends with advice that fits the reason: too many answers without a score, or no signal for long."""

import json

import pytest

from conftest import make_problem
from rlcs.errors import TrainingError
from rlcs.recipe.stages import Grpo
from rlcs.records import Grade, Group, Prompt, Rollout, StopReason
from rlcs.train import stops
from rlcs.train.groups import make_group
from test_train import SMALL, run_grpo

WHY = "mine: KeyError: 'level' (/x/mine.py:3)"


class Partial:
    """Scores all but every third answer; the others by their length."""

    def __init__(self, *, fails: bool = True) -> None:
        self.fails = fails

    def grade(self, answers):
        grades = [Grade(reward=len(text) % 7 / 7, correct=False) for _, text in answers]
        lost = Grade(reward=None, correct=None, why=WHY)
        return [lost if self.fails and i % 3 == 0 else grade for i, grade in enumerate(grades)]


@pytest.mark.fault(
    "user code", "a third of the answers is not scored", "stops with a checkpoint and the reason"
)
def test_a_share_without_scores_ends_the_run_which_goes_on_from_there(random_model_folder, tmp_path):
    settings = Grpo(**SMALL | {"steps": 4})
    match = (
        r"12 of the 36 answers of the last 3 steps are not scored, more than 5%; 4 of them in step 3: mine: "
    )
    with pytest.raises(TrainingError, match=match) as caught:
        run_grpo(random_model_folder, tmp_path / "a", settings, grader=Partial())
    assert "first for problem 'shapes-train-" in caught.value.what
    assert "correct the cause" in caught.value.fix and "box" not in caught.value.fix
    assert (tmp_path / "a" / "checkpoints" / "step-000003").is_dir()
    run_grpo(random_model_folder, tmp_path / "a", settings, grader=Partial(fails=False))
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


class Run:
    """What a watch needs of a run."""

    def __init__(self) -> None:
        self.carried, self.saved, self.zero_variance_steps = {}, [], 0

    def save(self, step: int) -> None:
        self.saved.append(step)


def group(grades, *, stop=StopReason.EOS, text=r"so \boxed{1}", settings=None) -> Group:
    settings = settings or Grpo(group_size=len(grades))
    rollouts = [
        Rollout(problem_id="p", index=i, ids=(30, 40), logprobs=(-1.0,) * 2, stop=stop, seed=0, text=text)
        for i in range(len(grades))
    ]
    prompt = Prompt(problem_id="p", ids=(1, 2), images=(), grids=(), spans=(), image_token_id=0, merge_size=2)
    return make_group(make_problem("p"), prompt, rollouts, grades, settings)


RIGHT, WRONG = Grade(reward=1.0, correct=True), Grade(reward=0.0, correct=False)
LOST = Grade(reward=None, correct=None, why=WHY)


@pytest.mark.parametrize(
    ("unscored", "ends_after"),
    [([1] * 30, None), ([2] * 30, None), ([3] * 30, 4), ([0] * 9 + [25], 10), ([9] + [0] * 20, None)],
    ids=["2.5%", "5%", "7.5%", "at once", "long ago"],
)
def test_more_than_five_in_a_hundred_and_at_least_ten_are_too_many(unscored, ends_after):
    run = Run()
    watch = stops.ScoreWatch(run)
    for step, count in enumerate(unscored, start=1):
        groups = [group([LOST] * count + [WRONG] * (40 - count))]
        watch.add(groups)
        if step == ends_after:
            with pytest.raises(TrainingError, match="mine: KeyError"):
                watch.require(groups, step=step)
            break
        watch.require(groups, step=step)
    assert run.saved == ([ends_after] if ends_after else [])
    assert ("unscored" in run.carried) != bool(ends_after)  # after a stop it is counted anew


MINE = {"reward": {"accuracy": 0, "functions": {"/x/mine.py:mine": 1}}}


@pytest.mark.fault("numbers", "no step has a signal", "stops with advice that fits")
@pytest.mark.parametrize(
    ("grade", "options", "advice"),
    [
        (LOST, {}, "correct the cause"),
        (Grade(reward=None, correct=None, why="mine: timed out after 5 s"), {}, "grpo.reward.deadline_s"),
        (
            WRONG,
            {"stop": StopReason.LENGTH, "text": "and so on"},
            "cut at grpo.max_new_tokens=2048: raise it",
        ),
        (RIGHT, {}, "nearly all answers are right"),
        (WRONG, {"text": "I do not know"}, "no \\boxed{} to read"),
        (WRONG, {}, "nearly all answers are wrong"),
        (WRONG, {"settings": Grpo(**MINE)}, "mine gives all answers to a problem the same reward (0.0)"),
    ],
    ids=["raises", "late", "cut", "right", "no box", "wrong", "function"],
)
def test_advice_fits_what_the_answers_have_in_common(grade, options, advice):
    settings = options.get("settings") or Grpo(max_new_tokens=2048)
    run = Run()
    for _ in range(settings.max_zero_variance_steps - 1):
        stops.require_signal(run, [group([grade] * 4, **options)], settings)
    with pytest.raises(TrainingError, match="nothing can be learnt") as caught:
        stops.require_signal(run, [group([grade] * 4, **options)], settings)
    assert advice in caught.value.fix
    if "boxed" not in advice:
        assert "box" not in caught.value.fix
