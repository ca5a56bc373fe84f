"""`rlcs grade --explain`: what was extracted, read and decided, for rows of a file or one pair."""

import json
from pathlib import Path

import pytest

from rlcs.errors import DataError
from rlcs.evals.answer_file import grade_file
from rlcs.evals.explanation import explain, select
from test_answer_file import rows_of, run, write

ROWS = (
    {"id": "right", "response": r"so \boxed{5}", "answer": "<answer>5</answer>"},
    {"id": "wrong", "response": "The answer is 5 m.", "answer": "5 cm"},
    {"id": "none", "response": "who could know that, dear reader?", "answer": "5"},
    {"id": "bad", "response": r"\boxed{C}", "answer": "F", "choices": ["1", "2"]},
    {"id": "blank", "response": r"\boxed{C}", "answer": ""},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", *ROWS)


def explained(file: Path, name: str) -> str:
    graded = grade_file(file, None, rule="rlcs").graded
    return "\n".join(explain(*next(each for each in graded if each[0].fields["id"] == name)))


def test_each_side_is_shown_as_it_was_found_and_read(file: Path) -> None:
    right = explained(file, "right")
    assert right.startswith("right\n")
    assert "answer   5  (the last box)" in right
    assert "gold     5  (<answer>, in <answer>5</answer>)" in right
    assert "read     number: 5   against   number: 5" in right
    wrong = explained(file, "wrong")
    assert 'answer   5 m  (the words "the answer is")' in wrong and "gold     5 cm\n" in wrong
    assert "quantity: 5 m   against   quantity: 5 cm" in wrong and "rule     " in wrong


def test_what_has_no_answer_or_no_verdict_is_explained_too(file: Path) -> None:
    assert "answer   none" in explained(file, "none") and "no box" in explained(file, "none")
    bad = explained(file, "bad")
    assert bad.startswith("not scored") and "choices  1; 2" in bad and "names no option" in bad
    assert explained(file, "blank") == "not scored: no gold answer"


def test_wrong_rows_come_first_and_ids_choose(file: Path) -> None:
    graded = grade_file(file, None, rule="rlcs").graded
    names = [row.fields["id"] for row, _ in select(graded, [], 4)]
    assert names == ["wrong", "none", "bad", "blank"]
    assert [row.fields["id"] for row, _ in select(graded, ["right", "none"], 1)] == ["right", "none"]
    with pytest.raises(DataError, match="no row has the id 'x'"):
        select(graded, ["right", "x"], 1)


def test_the_command_explains_a_file_and_writes_the_values(file: Path, tmp_path: Path) -> None:
    done = run(file, "--explain", "--limit", 1, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("line 2 (id wrong): wrong\n") and done.stdout.count("rule  ") == 1
    rows = rows_of(tmp_path / "out.jsonl")
    assert rows[1]["answer_value"].startswith("quantity") and rows[0]["gold_value"] == "number: 5"
    official = run(file, "--explain", "--rule", "wemath", "--id", "bad")
    assert (
        "(by the official rule)" in official.stdout and "wrong by We-Math's official rule" in official.stdout
    )


def test_an_unscored_row_is_named_once_and_only_if_it_is_meant(file: Path) -> None:
    done = run(file, "--explain", "--limit", 3)
    assert "line 4 (id bad): not scored" in done.stdout and "(id bad)" not in done.stderr
    assert "(id blank): no gold answer" in done.stderr
    assert "unscored: " not in run(file, "--explain", "--id", "right").stderr
    assert "(id bad)" in run(file, "--explain", "--id", "right", "--json").stderr


@pytest.mark.parametrize(("gold", "choices"), [("", ""), ("D", "1;2"), ("略", "")])
def test_one_pair_that_cannot_be_scored_is_exit_code_2(gold: str, choices: str) -> None:
    done = run("--response", "5", "--gold", gold, "--choices", choices)
    assert done.returncode == 2 and done.stdout.startswith("not scored\n  answer   5  (")


def test_one_pair_needs_no_file() -> None:
    done = run("--response", r"\boxed{12}", "--gold", "B", "--choices", "10; 12; 14")
    assert done.returncode == 0 and done.stdout.startswith("right\n") and "choices  10; 12; 14" in done.stdout
    assert "read     number: 12   against   option B: number: 12" in done.stdout
    assert "rule     compared with the value of option B: the same text" in done.stdout
    facts = json.loads(run("--response", "5", "--gold", "#### 6", "--json").stdout)
    assert facts["correct"] is False and facts["gold_value"] == "number: 6" and facts["prediction"] == "5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a file, or --response and --gold"),
        (("--gold", "5"), "add --response"),
        (("--response", "5"), "add --gold"),
        (("nofile.jsonl",), "nofile.jsonl: no such file"),
        (("FILE", "--gold", "5"), "give a file, or --response and --gold"),
        (("FILE",), "add --out or --explain"),
    ],
)
def test_what_is_left_out_is_asked_for(file: Path, words: tuple[str, ...], message: str) -> None:
    done = run(*(str(file) if word == "FILE" else word for word in words))
    assert done.returncode == 2 and message in done.stderr
