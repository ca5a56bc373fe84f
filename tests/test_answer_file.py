"""`rlcs grade`: good files, and every way in which a file can be bad, through the real command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plain_grading import grade
from rlcs.errors import DataError
from rlcs.evals.answer_file import grade_file, read_answers
from rlcs.records import Problem
from test_grading_official import needs_files, read


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlcs", "grade", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_same_rows_come_back_with_a_verdict(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"id": "1", "response": r"so \boxed{\sqrt{12}}", "answer": r"2\sqrt{3}", "extra": [1]},
        {"id": 2, "response": "The answer is (B) 12.", "answer": "B", "choices": ["10", 12]},
        {"id": "3", "response": r"\boxed{6}", "answer": 5},
        {"id": "4", "response": "no idea at all, sorry about that", "extraction": "5", "answer": "5"},
        {"id": "5", "response": r"\boxed{1.24}", "answer": "1.2", "precision": 1},
        {"id": "6", "response": r"\boxed{13}", "answer": ["13"]},
    )
    done = run(file, "--out", tmp_path / "out.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert (numbers["rows"], numbers["right"], numbers["wrong"], numbers["unscored"]) == (6, 5, 1, 0)
    assert numbers["accuracy"] == 5 / 6 and numbers["rule"] == "rlcs"
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["correct"] for row in rows] == [True, True, False, True, True, True]
    assert rows[0]["extra"] == [1] and rows[0]["prediction"] == r"\sqrt{12}" and rows[1]["id"] == 2
    assert "option B" in rows[1]["why"] and all(row["why"] for row in rows)


def test_strict_wants_a_box(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"id": "1", "response": "The answer is 5.", "answer": "5"})
    assert grade_file(file, tmp_path / "out.jsonl", rule="rlcs").count(True) == 1
    assert "accuracy 0.00%" in run(file, "--out", tmp_path / "out.jsonl", "--strict").stdout


BAD = {
    "{torn": "invalid JSON",
    "[1]": "must hold a JSON object, not list; JSON Lines has one object a line",
    '{"id": "x", "answer": "5"}': "no 'response'",
    '{"id": "x", "response": "5"}': "no 'answer'",
    '{"id": "x", "response": null, "answer": "5"}': "'response' must be a text, not null",
    '{"id": "x", "response": 5, "answer": "5"}': "'response' must be a text, not 5",
    '{"id": "x", "response": "5", "answer": true}': "'answer' must be a text, not true",
    '{"id": "x", "response": "5", "answer": [true]}': "the answer must be a text or a number, not bool",
    '{"id": "x", "response": "5", "answer": []}': "the answer must be a text or a number, not list",
    '{"id": "x", "response": "5", "answer": "x = 2 or"}': "is not complete",
    '{"id": "x", "response": "5", "answer": ""}': "no gold answer",
    '{"id": "x", "response": "5", "answer": null}': "no gold answer",
    '{"id": "x", "response": "5", "answer": "5", "choices": "ab"}': "'choices' must be a list",
    '{"id": "x", "response": "5", "answer": "5", "precision": "two"}': "'precision' must be",
    '{"id": "x", "response": "5", "answer": "E", "choices": ["1", "2"]}': "names no option",
    '{"id": "x", "response": "5", "answer": "\\\\frac{1}{"}': "braces do not match",
    '{"id": "x", "response": "5", "answer": "\\\\foo{\\\\bar}^^"}': "is not a formula",
}


def test_a_bad_row_is_unscored_named_and_counted(tmp_path: Path) -> None:
    good = {"id": "1", "response": r"\boxed{5}", "answer": "5"}
    file = write(tmp_path / "a.jsonl", good, *BAD, {**good, "response": ""})
    done = run(file, "--out", tmp_path / "out.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["correct"] for row in rows] == [True, *[None] * len(BAD), False]
    assert json.loads(done.stdout)["unscored"] == len(BAD)
    named = done.stderr.splitlines()
    for number, (why, line) in enumerate(zip(BAD.values(), named, strict=True), start=2):
        assert f"line {number}" in line and why in line
    assert rows[-1]["why"] == "the response is empty"


def test_one_broken_row_hides_no_wrong_answer(tmp_path: Path) -> None:
    five = {"answer": "E", "choices": ["1", "2", "3", "4", "5"]}
    file = write(
        tmp_path / "a.jsonl",
        {"id": "1", "response": r"\boxed{2}", "answer": "E", "choices": ["1", "2"]},
        {"id": "2", "response": r"\boxed{A}", **five},
        {"id": "3", "response": r"\boxed{E}", **five},
    )
    tally = grade_file(file, tmp_path / "out.jsonl", rule="rlcs")
    assert (tally.count(True), tally.count(False), tally.count(None)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("precision", "right"),
    [(2, True), (2.0, True), (0, True), (None, False), (-1, False), (10**6, False), ("2", False),
     (float("nan"), False), (True, False), (0.5, False)],
)  # fmt: skip
def test_decimal_places_are_read_alike_in_training(precision: object, right: bool) -> None:
    asked = Problem(id="1", source="s", question="?", answer="1.25", metadata={"precision": precision})
    assert grade(asked, r"\boxed{1.254}", allow_fallbacks=False).correct is right


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        (None, (), "no such file"),
        ((), (), "the file is empty"),
        (({"id": "1"}, {"id": "2"}), (), "no row can be graded (line 1: no 'answer'"),
        (("[", '{"id": "1"},', "]"), (), "JSON Lines has one object a line"),
        (("id,response,answer", "1,5,5"), (), "write JSON Lines, a row is {"),
        (({"response": "A", "answer": ["A"]},), ("--rule", "wemath"), "a list of gold answers"),
        (({"response": "5", "answer": "5"},), ("--rule", "foo"), "unknown rule 'foo'"),
        (({"response": "5", "answer": "5"},), ("--rule", "wemath"), "none: no row could be scored"),
    ],
)
def test_a_bad_file_is_exit_code_2(
    tmp_path: Path, lines: tuple[object, ...] | None, words: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "a.jsonl" if lines is None else write(tmp_path / "a.jsonl", *lines)
    done = run(file, "--out", tmp_path / "out.jsonl", *words)
    assert done.returncode == 2 and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_answers_are_not_overwritten(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"response": "5", "answer": "5"})
    assert "would overwrite" in run(file, "--out", file).stderr


def test_hostile_answers_end_soon_and_wrong_or_unscored(tmp_path: Path) -> None:
    hostile = [
        "x" * 1_000_000, r"\boxed{", r"\boxed{" * 20_000, r"\boxed{9**9**9**9}",
        r"\boxed{" + "(" * 4000 + "}",
        r"\boxed{" + r"\frac{1}{2}+" * 8000 + "1}", 
        r"\boxed{\sum_{k=1}^{2} \binom{8 \cdot 12499999}{5000000}}",
    ]  # fmt: skip
    good = [
        {"response": rf"\boxed{{{n}\sqrt{{3}}}}", "answer": rf"\sqrt{{{3 * n * n}}}"} for n in range(2, 30)
    ]
    file = write(tmp_path / "a.jsonl", *[{"response": text, "answer": "x^2"} for text in hostile], *good)
    tally = grade_file(file, tmp_path / "out.jsonl", rule="rlcs")
    assert (tally.count(True), tally.count(False), tally.count(None)) == (28, 6, 1)
    assert "timed out" in tally.unscored[0]


@needs_files
def test_our_rule_on_the_published_responses_of_mathvision(tmp_path: Path) -> None:
    problems = {row["id"]: row for row in read("mathvision/test.jsonl")}
    listed = (Path(__file__).parents[1] / "docs/reference/grading.md").read_text(encoding="utf-8")
    listed = listed.partition("## Disagreements")[2]
    disagreements = {cell.strip() for line in listed.splitlines() if line.startswith("| ")
                     for cell in line.split("|")[2].split(",")}  # fmt: skip
    published = read("mathvision/published/Gemini-Pro-CoT.jsonl")
    some = [row for row in published if row["id"] in disagreements or int(row["id"]) % 10 == 0]
    file = write(
        tmp_path / "a.jsonl",
        *[
            {**row, "answer": problems[row["id"]]["answer"], "choices": problems[row["id"]]["options"]}
            for row in some
        ],
    )
    flags = {row["id"]: row["correct"] for row in some}
    grade_file(file, tmp_path / "out.jsonl", rule="rlcs")
    found = {row["id"] for row in rows_of(tmp_path / "out.jsonl") if row["correct"] is not flags[row["id"]]}
    assert len(found) == 25 and found <= disagreements
    assert grade_file(file, tmp_path / "out.jsonl", rule="mathvision").count(True) == sum(flags.values())


@needs_files
def test_the_reward_cases(tmp_path: Path) -> None:
    cases = [
        case
        for case in read("grader_cases.json")["cases"]
        if case["kind"] == "reward" and isinstance(case["prediction"], str)
    ]
    file = write(
        tmp_path / "a.jsonl",
        *[
            {
                "id": case["id"],
                "response": case["prediction"] * case.get("repeat", 1),
                "answer": case["gold"],
                "choices": case.get("choices"),
            }
            for case in cases
        ],
    )
    grade_file(file, tmp_path / "out.jsonl", rule="rlcs", allow_fallbacks=False)
    verdicts = {row["id"]: row["correct"] is True for row in rows_of(tmp_path / "out.jsonl")}
    assert [case["id"] for case in cases if verdicts[case["id"]] != case["expected"]] == []


def test_what_rows_lack_of_their_question_comes_from_the_file_of_golds(tmp_path):
    golds = tmp_path / "golds.json"
    golds.write_text(json.dumps({"1": {"answer": "B", "options": ["3", "4"]}, "2": {"answer": "9"}}))
    rows = [{"pid": "1", "response": "\\boxed{4}"}, {"id": 2, "answer": "7", "response": "\\boxed{7}"}]
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([*rows, {"id": "3", "response": "\\boxed{1}"}, "no row"]))
    tally = grade_file(answers, None, rule="rlcs", golds=golds)
    assert [grade.correct for _, grade in tally.graded] == [True, True, None, None]
    assert tally.unscored == [
        "row 3 (id 3): golds.json has no row with this id",
        "row 4: a row must be a JSON object",
    ]
    answers.write_text(json.dumps(rows[:1]))
    with pytest.raises(DataError, match="--golds FILE"):
        read_answers(answers)
