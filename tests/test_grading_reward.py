"""A reward of parts: the sum, the form, what decides "correct", the trial before a run, and whole runs."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from conftest import rlcs
from rlcs.data import puzzles
from rlcs.errors import RecipeError
from rlcs.grading.reward import FormatGrader, add_parts, advice, open_reward, try_reward
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.stages import Reward
from rlcs.records import Grade, Problem, from_row, to_row
from test_pipeline import SMALL

CODE = r"""
import math, time

def brief(problem, response):
    return 1 / len(response)

def says_yes(problem, response):
    return 0.5, "yes" in response

def raises(problem, response):
    return inner(problem)

def inner(problem):
    return problem["metadata"]["nowhere"]

def nothing(problem, response):
    pass

def text(problem, response):
    return "1.0"

def no_number(problem, response):
    return math.nan

def huge(problem, response):
    return -1e308

def hangs(problem, response):
    time.sleep(600)

def same(problem, response):
    return 0.25

def spoils(problem, response):
    if response not in ("I do not know.", "\\boxed{%s}" % problem["answer"]):
        raise ValueError("not this\none")
    return float(len(response))
"""
PROBLEM = Problem(id="p-1", source="test", question="how many?", answer="7")
PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "own-reward.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "rewards.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def grades(reward: Reward, *responses: str, only_correct: bool = False) -> list[Grade]:
    with open_reward(reward, only_correct=only_correct) as grader:
        return grader.grade([(PROBLEM, response) for response in responses])


def test_the_reward_is_the_plain_weighted_sum():
    parts = {
        "accuracy": Grade(reward=1.0, correct=True, extracted="7", why="equal"),
        "brief": Grade(reward=-0.5, correct=False, why="by the reward function"),
    }
    grade = add_parts(parts, {"accuracy": 0.9, "brief": 2.0})
    assert grade.reward == pytest.approx(-0.1)
    assert (grade.correct, grade.extracted, grade.why) == (True, "7", "equal")
    assert grade.parts == {"accuracy": 1.0, "brief": -0.5}


def test_an_answer_without_one_part_is_unscored_and_keeps_the_others():
    parts = {
        "accuracy": Grade(reward=1.0, correct=True, extracted="7", why="equal"),
        "brief": Grade(reward=None, correct=None, why="timed out after 5 s"),
    }
    grade = add_parts(parts, {"accuracy": 1.0, "brief": 0.1})
    assert (grade.reward, grade.correct, grade.why) == (None, None, "brief: timed out after 5 s")
    assert grade.parts == {"accuracy": 1.0, "brief": None}
    assert from_row(Grade, json.loads(json.dumps(to_row(grade)))) == grade


def test_a_sum_that_is_not_finite_is_no_reward():
    parts = {"a": Grade(reward=1e200, correct=True), "b": Grade(reward=-1.0, correct=True)}
    grade = add_parts(parts, {"a": 1e200, "b": 1.0})
    assert (grade.reward, grade.correct, grade.why) == (None, None, "the sum of its parts is not finite")


@pytest.mark.parametrize(
    "key", ["accuracy", "format", "length", "judge.weight", "functions={f.py:score: %s}", "overlong.penalty"]
)
@pytest.mark.parametrize("weight", ["1e300", "1000001"])
def test_a_huge_weight_is_refused_by_its_key(key, weight):
    path = f"grpo.{key}" if key.startswith("overlong") else f"grpo.reward.{key}"
    given = path % weight if "%s" in path else f"{path}={weight}"
    with pytest.raises(RecipeError, match=path.partition("=")[0]):
        load_recipe("quickstart", [given])


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"so \boxed{7}", True),
        (r"<think>two and five</think> so \boxed{7}", True),
        (r"two and five</think> so \boxed{7}", True),  # the template opened it
        (r"\boxed{3} no, \boxed{7}", True),
        ("7", False),
        (r"<think>two and five so \boxed{7}", False),
        (r"<think>two</think><think>five</think>\boxed{7}", False),
        (r"<think>two <think>and</think> \boxed{7}", False),
        (r"two</think> five</think> \boxed{7}", False),
        (r"</think><think>\boxed{7}", False),
        (r"<think>two and five so \boxed{7}</think>", False),
        (r"\boxed{7} or \boxed{8", False),
        (r"\boxed{ }", False),
        ("", False),
    ],
)
def test_the_form_is_closed_reasoning_and_a_box_that_is_not_empty(response, right):
    [grade] = FormatGrader().grade([(PROBLEM, response)])
    assert (grade.reward, grade.correct) == (float(right), right)


def test_parts_of_all_kinds_are_graded_together(file):
    reward = Reward(accuracy=0.9, format=0.1, functions={f"{file}:brief": 2.0, f"{file}:says_yes": -1.0})
    right, wrong = grades(reward, r"\boxed{7}", r"it is 7")
    assert right.parts == {"accuracy": 1.0, "brief": 1 / 9, "says_yes": 0.5, "format": 1.0}
    assert right.reward == pytest.approx(0.9 + 2 / 9 - 0.5 + 0.1) and right.correct is True
    assert wrong.parts == {"accuracy": 0.0, "brief": 1 / 7, "says_yes": 0.5, "format": 0.0}
    assert wrong.correct is False and wrong.why == "no box"


def test_without_the_rule_the_first_function_says_what_is_correct(file):
    reward = Reward(accuracy=0, format=1.0, functions={f"{file}:says_yes": 1.0, f"{file}:brief": 1.0})
    yes, no = grades(reward, "yes", r"\boxed{7}")
    assert (yes.correct, no.correct) == (True, False)
    [formed] = grades(Reward(accuracy=0, format=0.2), r"\boxed{8}")
    assert (formed.reward, formed.correct) == (0.2, True)


def test_a_measurement_asks_the_part_that_decides_alone(file):
    reward = Reward(format=0.5, functions={f"{file}:raises": 1.0})
    [grade] = grades(reward, r"\boxed{7}", only_correct=True)
    assert (grade.correct, grade.parts) == (True, {"accuracy": 1.0})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", r"KeyError: 'nowhere' \(.*rewards.py:14\)"),
        ("nothing", r"it returned None, neither a number nor a pair .*rewards.py"),
        ("text", r"it returned '1.0', neither a number"),
        ("no_number", r"the reward is nan"),
        ("huge", r"the reward is -1e\+308, larger than 1,000,000 in size"),
        ("hangs", r"timed out after 1 s\n  -> raise grpo.reward.deadline_s"),
    ],
)
def test_the_trial_refuses_a_function_that_fails(file, name, says):
    reward = Reward(functions={f"{file}:{name}": 1.0}, deadline_s=1.0)
    with open_reward(reward) as grader, pytest.raises(RecipeError, match=says) as caught:
        try_reward(grader, PROBLEM)
    assert str(caught.value).startswith(f"grpo.reward.functions: {name} does not score the answer")
    assert ("deadline" in caught.value.fix) == (name == "hangs")


def test_the_trial_warns_where_right_and_wrong_score_the_same(file):
    with open_reward(Reward(format=1, functions={f"{file}:same": 1.0})) as grader:
        [warning] = try_reward(grader, PROBLEM)
    assert "same gives" in warning and "the same 0.25" in warning


def test_the_trial_warns_where_training_lowers_what_is_correct(file):
    with open_reward(Reward(accuracy=0, functions={f"{file}:brief": -1.0})) as grader:
        [warning] = try_reward(grader, PROBLEM)
    assert "brief decides what is correct" in warning and "its weight is negative" in warning
    with open_reward(Reward(functions={f"{file}:brief": -1.0})) as grader:
        assert try_reward(grader, PROBLEM) == []


def test_a_file_that_cannot_be_run_and_one_with_neighbours(tmp_path):
    (tmp_path / "near.py").write_text("ONE = 1", encoding="utf-8")
    (tmp_path / "good.py").write_text("from near import ONE\ndef score(p, r): return ONE", encoding="utf-8")
    (tmp_path / "bad.py").write_text("\nimport far_away\ndef score(p, r): return 1", encoding="utf-8")
    [good] = grades(Reward(accuracy=0, functions={f"{tmp_path}/good.py:score": 1.0}), "x")
    assert good.reward == 1.0
    [bad] = grades(Reward(accuracy=0, functions={f"{tmp_path}/bad.py:score": 1.0}), "x")
    assert bad.why == f"score: ModuleNotFoundError: No module named 'far_away' ({tmp_path}/bad.py:2)"


def test_advice_fits_the_cause():
    assert "deadline_s" in advice("score: timed out after 5 s")
    assert "deadline_s" not in advice("score: KeyError: 'level' (my_reward.py:7)")
    silent = "judge: the judge gave no reply: "
    assert "grpo.reward.judge.max_requests" in advice(f"{silent}the limit of 20 requests is reached")
    assert "grpo.reward.judge.max_wait_s" in advice(f"{silent}no reply in time")
    assert "grpo.reward.judge.request_timeout_s" in advice(f"{silent}no answer within 60 s")
    assert "log of the judge's server" in advice(f"{silent}HTTP 504: upstream timed out")
    assert "the judge's server runs" in advice(f"{silent}the connection failed: ReadError")


def test_the_function_of_the_page_works_as_it_is_written(tmp_path):
    [code] = re.findall(r"```python\n(# my_reward.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_reward.py").write_text(code, encoding="utf-8")
    words = re.findall(
        r"rlcs run mine.yaml '(grpo.reward.functions=.*?)' (grpo.reward.\S+)", PAGE.read_text()
    )
    overrides = [word.replace("my_reward.py", f"{tmp_path}/my_reward.py") for word in words[0]]
    reward = load_recipe("quickstart", overrides).recipe.grpo.reward
    problems = puzzles.load("puzzles", split="train", count=60, seed=1)
    answers = [(p, f"I count them, so it is \\boxed{{{p.answer}}}") for p in problems]
    answers += [(p, f"{p.answer} \\boxed{{not {p.answer}}}") for p in problems]
    with open_reward(reward) as grader:
        assert try_reward(grader, problems[0]) == []
        found = grader.grade(answers)
    assert [g.correct for g in found] == [True] * 60 + [False] * 60
    assert {g.reward for g in found} == {1.1, 0.1}


def test_a_function_that_raises_ends_the_command_before_anything_is_done(file, tmp_path, random_model_folder):
    words = ["run", "quickstart", f"model.name={random_model_folder}", *SMALL, "--out", tmp_path / "run"]
    done = rlcs(*words, f"grpo.reward.functions={{{file}:raises: 1}}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "raises does not score the answer '\\\\boxed{" in done.stderr
    assert f"KeyError: 'nowhere' ({file}:14)\n  -> correct the cause" in done.stderr
    assert not (tmp_path / "run" / "cold_start").exists()


def test_a_run_stops_where_nothing_is_scored_and_goes_on_with_every_part_journalled(
    file, tmp_path, random_model_folder
):
    (tmp_path / "mine.py").write_text(CODE, encoding="utf-8")
    run, stage = tmp_path / "run", tmp_path / "run" / "sft_grpo"
    words = ["run", "quickstart", f"model.name={random_model_folder}", *SMALL, "study.arms=[base,sft_grpo]"]
    words += [
        "grpo.reward={format: 0.1, length: 0.2}",
        f"grpo.reward.functions={{{tmp_path}/mine.py:spoils: 0.5}}",
    ]
    words += ["--out", run]
    stopped = rlcs(*words)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert (
        "none of the 6 answers of step 1 is scored; 6 of them: spoils: ValueError: not this one"
        in stopped.stderr
    )
    assert "deadline_s" not in stopped.stderr
    [row, *_] = rows_of(stage / "rollouts" / "step-000001.jsonl")
    assert row["reward"] is None and row["parts"] == {"accuracy": 0.0, "spoils": None, "format": 0.0}
    assert (run / "sft" / "done.json").exists() and not (stage / "done.json").exists()

    (tmp_path / "mine.py").write_text(CODE.replace("raise ValueError", "ValueError"), encoding="utf-8")
    done = rlcs(*words)
    assert done.returncode == 0, done.stderr
    assert "1 x accuracy + 0.5 x spoils + 0.1 x format + 0.2 x length; correct: by accuracy" in done.stdout
    rows = rows_of(stage / "rollouts" / "step-000001.jsonl")
    for row in rows:
        accuracy, spoils, form, length = row["parts"].values()
        assert row["reward"] == pytest.approx(accuracy + 0.5 * spoils + 0.1 * form + 0.2 * length)
        assert spoils == len(row["response"]) and -0.5 <= length <= 0.5
    [first, _] = rows_of(stage / "metrics.jsonl")
    assert first["reward_spoils"] == pytest.approx(fmean(row["parts"]["spoils"] for row in rows))
    assert {"reward_accuracy", "reward_format", "reward_length"} <= first.keys()
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    for part in ("accuracy", "spoils", "format", "length"):
        assert f"Reward: {part}" in page
    assert "Parts of the reward</dt><dd>accuracy 0, spoils " in (run / "report" / "rollouts.html").read_text(
        encoding="utf-8"
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
