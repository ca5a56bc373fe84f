"""Demonstrations: given ones are used as they are, the teacher's are graded and sorted."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from conftest import make_conversation
from rlcs.data import puzzles
from rlcs.data.loading import load
from rlcs.data.rows import Row
from rlcs.distill.run import load_kept, run
from rlcs.errors import UserError
from rlcs.recipe.schema import Data, Teacher
from rlcs.records import Grade, Problem
from rlcs.storage import read_json, read_jsonl


def builtin_rows(count: int = 40) -> list[Row]:
    return [
        Row(problem=p, response=None) for p in puzzles.load("puzzles", split="train", count=count, seed=5)
    ]


def given(name: str, response: str) -> Row:
    return Row(problem=Problem(id=name, source="mine", question="?", answer="5"), response=response)


def test_wrong_answers_of_the_teacher_are_rejected(tmp_path: Path) -> None:
    rows = builtin_rows()
    kept = run(rows, Teacher(wrong_share=0.5), folder=tmp_path, seed=1)
    rejected = read_jsonl(tmp_path / "rejected.jsonl")
    stats = read_json(tmp_path / "stats.json")
    assert 5 < len(kept) < 35 and len(kept) + len(rejected) == 40
    assert all(d.grade is not None and d.grade.correct and d.teacher == "builtin" for d in kept)
    assert all(row["response"] and "other" in row["why"] for row in rejected)
    assert [d.problem.id for d in kept] == [
        r.problem.id for r in rows if r.problem.id in {d.problem.id for d in kept}
    ]
    assert (stats["asked"], stats["kept"], stats["rejected"]) == (40, len(kept), len(rejected))
    assert stats["without_demonstration"] == 40 - len(kept)


def test_more_samples_answer_more_problems(tmp_path: Path) -> None:
    rows = builtin_rows()
    kept = run(rows, Teacher(wrong_share=0.5, max_samples=12), folder=tmp_path, seed=1)
    assert len(kept) == 40 and max(d.attempt for d in kept) > 0
    once = run(rows, Teacher(wrong_share=0.5, max_samples=1), folder=tmp_path, seed=1)
    assert {d.problem.id for d in once} == {d.problem.id for d in kept if d.attempt == 0}


def test_keep_all_imitates_wrong_answers_too(tmp_path: Path) -> None:
    kept = run(builtin_rows(), Teacher(wrong_share=0.5, keep="all", max_samples=3), folder=tmp_path, seed=1)
    assert len(kept) == 40 and all(d.attempt == 0 for d in kept)
    assert (
        read_json(tmp_path / "stats.json")["kept_wrong"]
        == sum(not d.grade.correct for d in kept if d.grade)
        > 5
    )


MIXED = [
    given("right", r"\boxed{5}"),
    given("wrong", r"\boxed{6}"),
    given("open", "I do not know what is shown here, sorry."),
    replace(given("own", r"\boxed{6}"), gradable=False),
]


def test_wrong_given_demonstrations_are_left_out_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    view = Mock(say=said.append)
    kept = run([*MIXED, *builtin_rows(3)], Teacher(wrong_share=0.0), folder=tmp_path, seed=1, view=view)
    assert [d.teacher for d in kept] == ["given", "given", "builtin", "builtin", "builtin"]
    assert [d.problem.id for d in kept[:2]] == ["right", "own"]
    stats = read_json(tmp_path / "stats.json")
    counts = {"given": 4, "given_wrong": 2, "given_unscored": 0, "given_unchecked": 1, "asked": 3}
    assert counts.items() <= stats.items() and stats["rejected"] == 2 and stats["unscored"] == 0
    rejected = {row["id"]: row["why"] for row in read_jsonl(tmp_path / "rejected.jsonl")}
    assert rejected == {
        "wrong": "the final answer '6' is not the gold answer '5'",
        "open": "the response has no final answer: no box, no <answer> tag, no sentence with the answer, "
        "no lone letter",
    }
    assert said == [
        "2 of 4 demonstrations left out: their final answer is not the gold answer "
        "(first: mine id wrong, id open)",
        "1 of 4 demonstrations not checked: there is no gold answer beside the response to compare",
    ]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        *((text, True) for text in ("5", "The answer is 5.", "<answer>5</answer>", "$5$", "We add.\n#### 5")),
        *((text, False) for text in ("6", "It shows five bars, I think.", r"first 5, then \boxed{6}")),
    ],
)
def test_a_final_answer_needs_no_box_in_a_given_demonstration(response, right, tmp_path: Path) -> None:
    run([given("a", response), given("b", r"\boxed{5}")], Teacher(), folder=tmp_path, seed=1)
    assert read_json(tmp_path / "stats.json")["given_wrong"] == (0 if right else 1)


def test_keep_all_imitates_wrong_given_demonstrations(tmp_path: Path) -> None:
    kept = run(MIXED, Teacher(keep="all"), folder=tmp_path, seed=1)
    assert len(kept) == 4 and read_json(tmp_path / "stats.json")["kept_wrong"] == 2
    assert not read_jsonl(tmp_path / "rejected.jsonl")


def test_a_timeout_says_nothing_against_a_demonstration(tmp_path: Path, monkeypatch) -> None:
    late = Grade(reward=None, correct=None, why="timed out after 5 s")
    monkeypatch.setattr("rlcs.grading.pool.GradePool.grade", lambda self, answers: [late for _ in answers])
    kept = run(MIXED, Teacher(), folder=tmp_path, seed=1)
    assert len(kept) == 4
    stats = read_json(tmp_path / "stats.json")
    assert (stats["given_unscored"], stats["given_unchecked"], stats["given_wrong"]) == (3, 1, 0)
    monkeypatch.undo()
    assert len(run(MIXED, Teacher(), folder=tmp_path, seed=1)) == 2  # graded again, as the cause may be gone


def test_grades_of_given_demonstrations_are_kept_for_a_resume(tmp_path: Path, monkeypatch) -> None:
    run(MIXED, Teacher(), folder=tmp_path, seed=1)
    graded: list[str] = []

    def grade(self, answers):
        graded.extend(problem.id for problem, _ in answers)
        return [Grade(reward=1.0, correct=True) for _ in answers]

    monkeypatch.setattr("rlcs.grading.pool.GradePool.grade", grade)
    edited = [replace(MIXED[0], response=r"so \boxed{5}"), *MIXED[1:]]
    kept = run(edited, Teacher(), folder=tmp_path, seed=1)
    assert graded == ["right"] and [d.problem.id for d in kept] == ["right", "own"]


def test_the_same_seed_gives_the_same_files_and_another_other_mistakes(tmp_path: Path) -> None:
    rows, teacher = builtin_rows(), Teacher(wrong_share=0.5)
    first = run(rows, teacher, folder=tmp_path / "a", seed=1)
    assert run(rows, teacher, folder=tmp_path / "b", seed=1) == first
    assert (tmp_path / "a/kept.jsonl").read_bytes() == (tmp_path / "b/kept.jsonl").read_bytes()
    assert run(rows, teacher, folder=tmp_path / "c", seed=2) != first


def test_kept_demonstrations_can_be_read_again(tmp_path: Path) -> None:
    rows = [given("a", r"\boxed{5}"), *builtin_rows(5)]
    kept = run(rows, Teacher(), folder=tmp_path, seed=1)
    assert load_kept(rows, tmp_path) == kept
    with pytest.raises(UserError, match="no longer in the data"):
        load_kept(rows[1:], tmp_path)


def test_a_conversation_comes_back_from_the_files_that_were_written(tmp_path: Path) -> None:
    problem = make_conversation("talk", system="Be brief.")
    rows = [Row(problem=problem, response=r"All together: \boxed{4}"), *builtin_rows(1)]
    kept = run(rows, Teacher(wrong_share=0.0), folder=tmp_path, seed=1)
    assert load_kept(rows, tmp_path) == kept and kept[0].problem.history == problem.history
    for name, role in (("kept.jsonl", "cold_start"), ("problems.jsonl", "rl")):
        again = load(str(tmp_path / name), Data(), decode_limit=10**6, role=role).rows[0].problem
        assert (again.history, again.question) == (problem.history, problem.question)
        assert [ref.sha256 for ref in again.images] == [ref.sha256 for ref in problem.images]
    edited = [replace(rows[0], problem=replace(problem, history=problem.history[1:])), rows[1]]
    with pytest.raises(UserError, match="no longer in the data as it was"):
        load_kept(edited, tmp_path)


def test_further_columns_of_a_problem_go_with_it(tmp_path: Path) -> None:
    columns = {"precision": 0.1, "level": 3, "chapter": "angles", "pass_rate": "unknown"}
    problem = Problem(id="a", source="mine", question="?", answer="5", metadata=columns)
    rows = [Row(problem=problem, response=r"\boxed{5}"), *builtin_rows(1)]
    run(rows, Teacher(wrong_share=0.0), folder=tmp_path, seed=1)
    for name in ("kept.jsonl", "problems.jsonl"):
        mine, drawn = read_jsonl(tmp_path / name)
        assert (mine["precision"], mine["level"], mine["chapter"]) == (0.1, 3, "angles")
        assert mine["id"] == "a" and drawn["family"] == builtin_rows(1)[0].problem.metadata["family"]
    assert "pass_rate" not in read_jsonl(tmp_path / "problems.jsonl")[0]  # nobody was asked here
    loaded = load(str(tmp_path / "problems.jsonl"), Data(), decode_limit=10**6, role="rl").rows[0]
    assert loaded.problem.metadata["precision"] == 0.1 and loaded.problem.metadata["chapter"] == "angles"


def test_kept_demonstrations_of_an_edited_problem_are_refused(tmp_path: Path) -> None:
    rows = [given("1", r"\boxed{5}"), given("2", r"\boxed{5}")]
    kept = run(rows, Teacher(), folder=tmp_path, seed=1)
    edited = [replace(rows[0], problem=replace(rows[0].problem, question="Which one?")), rows[1]]
    with pytest.raises(UserError, match=r"(?s)'1' is no longer in the data as it was.*restore"):
        load_kept(edited, tmp_path)
    lines = [{**row} for row in read_jsonl(tmp_path / "kept.jsonl")]
    assert all(row.pop("digest") for row in lines)  # a folder of before there was one
    (tmp_path / "kept.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert load_kept(rows, tmp_path) == kept


def test_a_problem_that_the_teacher_does_not_know_is_named(tmp_path: Path) -> None:
    foreign = Row(problem=Problem(id="mine-7", source="mine", question="?", answer="5"), response=None)
    with pytest.raises(UserError, match=r"(?s)mine-7.*response"):
        run([foreign], Teacher(), folder=tmp_path, seed=1)


def test_nothing_left_to_learn_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)none of 3 problems.*rejected\.jsonl"):
        run(builtin_rows(3), Teacher(wrong_share=1.0), folder=tmp_path, seed=1)
    assert len(read_jsonl(tmp_path / "rejected.jsonl")) == 3


def test_a_model_in_this_process_teaches(random_model_folder, tmp_path: Path) -> None:
    rows, model = builtin_rows(3), str(random_model_folder)
    teacher = Teacher(
        model=model, keep="all", max_samples=2, enough_kept=0, max_tokens=8, chain="caption", concurrency=4
    )
    kept = run(rows, teacher, folder=tmp_path / "a", seed=1)
    assert [d.problem for d in kept] == [row.problem for row in rows] and kept[0].teacher == model
    lines = read_jsonl(tmp_path / "a/samples.jsonl")
    first, last = ([line for line in lines if line["turn"] == turn] for turn in (0, 1))
    assert len(first) == 6 == len(last) and len(lines) == 12
    assert all(line["tokens"] <= 8 and line["prompt_tokens"] > 16 for line in lines)
    assert len({line["composed"] for line in last}) > 3 and not any("composed" in line for line in first)
    assert run(rows, teacher, folder=tmp_path / "b", seed=1) == kept
