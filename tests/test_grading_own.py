"""A reward function of one's own: checked before the run, called in killable workers, used by GRPO."""

import json
import os
from pathlib import Path

import pytest

from conftest import rlcs
from rlcs.errors import RecipeError
from rlcs.grading import GradePool
from rlcs.grading.own import check_function
from rlcs.records import Problem, Turn
from test_pipeline import SMALL

CODE = """
import time

def longer(problem, response):
    if response == "hang":
        time.sleep(600)
    if response == "raise":
        raise KeyError(problem["question"])
    if response == "nan":
        return float("nan")
    return len(response) / 10

def judged(problem, response):
    return 0.25, response == problem["answer"] and problem["metadata"]["level"] == 2
"""

MODULE = """
from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import KW_ONLY, dataclass

from near import ONE

@dataclass
class Size:
    _: KW_ONLY
    letters: int

def measure(response):
    return Size(letters=len(response) + ONE)

def score(problem, response):
    with ProcessPoolExecutor(1) as processes:
        return processes.submit(measure, response).result().letters
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def ask(response: str) -> tuple[Problem, str]:
    problem = Problem(id="1", source="test", question="why?", answer="yes", metadata={"level": 2})
    return problem, response


def test_a_number_is_the_reward_and_from_one_up_the_answer_is_correct(file):
    with GradePool(function=check_function(f"{file}:longer")) as pool:
        short, long = pool.grade([ask("four"), ask("ten" * 4)])
    assert (short.reward, short.correct) == (0.4, False)
    assert (long.reward, long.correct) == (1.2, True)


def test_a_function_gets_the_turns_before_the_question(tmp_path):
    path = tmp_path / "turns.py"
    path.write_text(
        "def turns(problem, response):\n    [turn] = problem['history']\n"
        "    return len(turn['role'] + turn['text']) / 100\n"
    )
    history = (Turn(role="system", text="Be brief."),)
    problem = Problem(id="1", source="test", question="why?", answer="yes", history=history)
    with GradePool(function=check_function(f"{path}:turns")) as pool:
        [grade] = pool.grade([(problem, "x")])
    assert grade.reward == 0.15


def test_a_pair_says_by_itself_whether_the_answer_is_correct(file):
    with GradePool(function=check_function(f"{file}:judged")) as pool:
        grades = pool.grade([ask("yes"), ask("no"), ask("yes")])
    assert [(g.reward, g.correct) for g in grades] == [(0.25, True), (0.25, False), (0.25, True)]


def test_what_fails_or_hangs_is_unscored_and_harms_no_other_answer(file):
    with GradePool(function=check_function(f"{file}:longer"), deadline_s=1.0) as pool:
        grades = pool.grade([ask("raise"), ask("hang"), ask("nan"), ask("four")])
    assert [g.reward for g in grades] == [None, None, None, 0.4]
    assert "KeyError: 'why?'" in grades[0].why
    assert "timed out after 1 s" in grades[1].why
    assert "the reward is nan" in grades[2].why


@pytest.mark.parametrize("name", ["mine.py", "json.py", "mine.txt"])
def test_the_file_is_a_module_with_dataclasses_processes_and_neighbours(tmp_path, name):
    (tmp_path / "near.py").write_text("ONE = 1", encoding="utf-8")
    (tmp_path / name).write_text(MODULE, encoding="utf-8")
    with GradePool(function=check_function(f"{tmp_path / name}:score"), deadline_s=30.0) as pool:
        [grade] = pool.grade([ask("four")])
    assert grade.reward == 5, grade.why


def test_a_file_that_ends_the_process_is_named(tmp_path):
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\ndef score(p, r): ...", encoding="utf-8")
    refused = pytest.raises(RecipeError, match=r"ends.py cannot be imported: .*exit code 3")
    with GradePool(function=check_function(f"{tmp_path}/ends.py:score")) as pool, refused as caught:
        pool.grade([ask("four")])
    assert "grpo.reward.functions" in str(caught.value) and "math-verify" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("rewards.py", "names no function"),
        ("missing.py:score", "cannot read .*missing.py: no such file"),
        ("pipe.py:score", "cannot read .*pipe.py: this is not a regular file"),
        (".:score", "cannot read .*: this is a folder"),
        ("rewards.py:longre", "no function 'longre'"),
        ("broken.py:score", "is no Python"),
        ("kinds.py:Scorer", r"'Scorer' in .*kinds.py is a class, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_the_run(file, tmp_path, given, says):
    (tmp_path / "broken.py").write_text("def score(:", encoding="utf-8")
    (tmp_path / "kinds.py").write_text("class Scorer: ...", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(RecipeError, match=says) as caught:
        check_function(str(tmp_path / given))
    assert "grpo.reward.functions" in str(caught.value)


def test_grpo_learns_from_it_and_the_command_line_refuses_a_wrong_one(file, tmp_path, random_model_folder):
    words = ["run", "quickstart", f"model.name={random_model_folder}", *SMALL, "--out", tmp_path / "run"]
    done = rlcs(
        *words,
        "study.arms=[base,sft_grpo]",
        f"grpo.reward.functions={{{file}:longer: 1}}",
        "grpo.reward.accuracy=0",
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "sft_grpo" / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["reward"] for row in rows] == [pytest.approx(len(row["response"]) / 10) for row in rows]
    refused = rlcs(*words[:-1], tmp_path / "other", f"grpo.reward.functions={{{file}:other: 1}}")
    assert refused.returncode == 2 and "its functions: longer, judged" in refused.stderr
