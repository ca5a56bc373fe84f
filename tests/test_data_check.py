"""`rlcs data check`: faults by name, a few of each kind, and the kinds of gold answers."""

import json
import subprocess
import sys

import pytest

from rlcs.data.check import grouped, kind_lines, kinds_of_golds
from rlcs.data.rows import BadRow
from rlcs.records import Problem


def row(name, answer, **more):
    return {"id": name, "question": "?", "answer": answer, **more}


ROWS = [
    row("tag", "<answer>B</answer>", choices=["1", "2"]),
    row("gsm8k", "#### 5"),
    row("unit", "5 cm"),
    row("formula", r"\foo{\bar}^^"),
    *(row(f"no-{i}", "F", choices=["1", "2"]) for i in range(8)),
    row("index", 0, choices=["1", "2"]),
    row("torn", r"\boxed{5"),
    row("equal", "A", choices=["1", "1", "2"]),
]


@pytest.fixture
def check(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ROWS))

    def run(*words):
        command = [sys.executable, "-m", "rlcs", "data", "check", str(file), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run


def test_faults_are_named_a_few_of_each_and_kinds_are_counted(check):
    done = check()
    assert done.returncode == 2 and not done.stderr
    assert done.stdout.count("'F' names no option") == 5 and "and 3 more rows with this fault" in done.stdout
    for name, fault in (("index", "an index from 0"), ("torn", "not closed"), ("formula", "not a formula")):
        assert any(f"(id {name})" in line and fault in line for line in done.stdout.splitlines()), name
    kinds = [line.split() for line in done.stdout.partition("gold answers")[2].splitlines()]
    assert ["quantity", "1", "5", "cm", "(id", "unit)"] in kinds and [
        "number",
        "1",
        "5",
        "(id",
        "gsm8k)",
    ] in kinds
    assert not any("formula" in words for line in kinds for words in line), "no example is a faulty row"
    assert "2 gold answers were unwrapped (<answer>: 1, ####: 1), e.g. row tag" in done.stdout
    assert done.stdout.endswith("4 rows can be used, 11 cannot\n")


def test_json_names_every_row(check):
    facts = json.loads(check("--json").stdout)
    assert facts["usable"] == 4
    assert {bad["id"] for bad in facts["bad"]} == {each["id"] for each in ROWS[3:-1]}
    assert facts["golds"]["choice letters (with choices)"] == {"rows": 2, "id": "tag", "answer": "B"}
    assert facts["notes"][1:] == ["rows with two equal options: 1, e.g. A and B of row equal"]


def test_as_given_asks_nothing_of_gold_answers(check):
    done = check("data.answers=as_given")
    assert done.returncode == 0 and "15 rows can be used, 0 cannot" in done.stdout


def test_rows_are_grouped_by_what_is_wrong_not_by_their_content():
    bad = [BadRow(where=f"rows.jsonl:{i}", reason=f"/data/{i}.png: no 'x{i}' at \"{i}\"") for i in range(7)]
    bad.insert(2, BadRow(where="rows.jsonl:9", reason="the id is empty"))
    assert grouped(bad) == [
        *map(str, [*bad[:2], *bad[3:6]]),
        "    and 2 more rows with this fault",
        "rows.jsonl:9: the id is empty",
    ]


def test_the_table_fits_the_terminal():
    long = Problem(id="i" * 30, source="s", question="?", answer="word\n" * 30)
    for columns in (80, 120):
        _, line = kind_lines(kinds_of_golds([long]), columns=columns)
        assert len(line) == columns and "word word..." in line.replace(" wo...", "...")


def test_kinds_come_by_number_and_blank_golds_do_not_count():
    golds = ["B", "5", r"\{1,2\}", "6", "", "(1,2)"]
    kinds = kinds_of_golds(
        Problem(id=f"r{i}", source="s", question="?", answer=gold) for i, gold in enumerate(golds)
    )
    assert next((kind, len(same)) for kind, same in kinds.items()) == ("number", 2)
    assert sum(map(len, kinds.values())) == 5 and kind_lines({}) == []
