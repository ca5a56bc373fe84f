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
    file = done.stdout.partition("(first: ")[2].partition(":5, :6, :7): ")[0]
    assert file.endswith("rows.jsonl")
    assert done.stdout.startswith(f"8 rows (first: {file}:5, :6, :7): the gold answer 'F' is no such option")
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
    bad += [BadRow(where=f"{side}.jsonl#{side}", reason="it isn't a row", id=side) for side in "ab"]
    bad += [BadRow(where="c.jsonl:1", reason="it isn't a picture", id="c")]
    assert grouped(bad) == [
        "7 rows (first: rows.jsonl:0, :1, :2): for example /data/0.png: no 'x0' at \"0\"",
        "2 rows (first: a.jsonl#a, b.jsonl#b): it isn't a row",
        "rows.jsonl:9: the id is empty",
        "c.jsonl:1 (id c): it isn't a picture",
    ]


def test_faults_in_files_of_any_name_are_one_kind():
    names = ["chart one.png", "my map.jpeg", "Zürich", "a/b c", "x.tif"]
    bad = [
        BadRow(where=f"r.jsonl:{i}", reason=f"{name}: no such file", subject=name)
        for i, name in enumerate(names)
    ]
    assert grouped(bad) == ["5 rows (first: r.jsonl:0, :1, :2): for example chart one.png: no such file"]


def test_many_faults_of_many_kinds_stay_short():
    def word(i):
        return "".join(chr(ord("a") + int(digit)) for digit in f"{i:06d}")

    bad = [BadRow(where=f"{'d/' * 90}rows.jsonl:{i}", reason=f"{word(i)} " * 200) for i in range(20_000)]
    lines = grouped(bad)
    assert len(lines) == 21 and max(map(len, lines)) <= 300
    assert lines[-1] == "19,980 rows with 19,980 further kinds of faults"


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
