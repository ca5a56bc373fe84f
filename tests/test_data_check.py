"""`rlcs data check`: faults by name, a few of each kind, and the kinds of gold answers."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from conftest import rlcs
from rlcs.data.check import grouped, kind_lines
from rlcs.data.loading import load
from rlcs.data.rows import BadRow, Row
from rlcs.data.tally import PromptLimit, Tally
from rlcs.recipe.schema import Data
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
    assert done.stdout.startswith(f"8 rows (first: {file}:5, :6, :7): the gold answer 'F' names no option")
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
    bad += [BadRow(where=f"{side}.jsonl", reason="it isn't a row", id=side) for side in "ab"]
    bad += [BadRow(where="c.jsonl:1", reason="it isn't a picture", id="c")]
    assert grouped(bad) == [
        "7 rows (first: rows.jsonl:0, :1, :2): for example /data/0.png: no 'x0' at \"0\"",
        "2 rows (first: a.jsonl id a, b.jsonl id b): it isn't a row",
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


def kinds_of_golds(golds):
    tally = Tally(PromptLimit(tokens=100, pixels=100))
    for place, gold in enumerate(golds):
        problem = Problem(id="i" * 29 + str(place), source="s", question="?", answer=gold)
        tally.add(place, Row(problem=problem, response=None))
    return tally.kinds


def test_the_table_fits_the_terminal():
    for columns in (80, 120):
        _, line = kind_lines(kinds_of_golds(["word\n" * 30]), columns=columns)
        assert len(line) == columns and "word word..." in line.replace(" wo...", "...")


def test_kinds_come_by_number_and_blank_golds_do_not_count():
    kinds = kinds_of_golds(["B", "5", r"\{1,2\}", "6", "", "(1,2)"])
    assert next((name, kind.rows, kind.answer) for name, kind in kinds.items()) == ("number", 2, "5")
    assert sum(kind.rows for kind in kinds.values()) == 5 and kind_lines({}) == []


# --- the recipe of a run -------------------------------------------------------------------------


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def image_file(path, size=(64, 48), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def chart(folder, number, size=(64, 48), **more):
    image_file(folder / f"img/{number}.png", size, (number % 256, 9, 9))
    return row(f"c{number}", str(number), question="How many bars?", images=[f"img/{number}.png"], **more)


@pytest.fixture
def study(tmp_path):
    """A folder with three sources and a recipe that names them."""
    solved = [{**chart(tmp_path, i), "response": rf"I count. \boxed{{{i}}}"} for i in range(40)]
    jsonl(tmp_path / "cold.jsonl", solved)
    jsonl(tmp_path / "rl.jsonl", [chart(tmp_path, i) for i in range(100, 170)])
    jsonl(tmp_path / "test.jsonl", [chart(tmp_path, i) for i in range(200, 220)])
    lines = "".join(f"  {role}: {name}.jsonl\n" for role, name in
                    (("cold_start", "cold"), ("rl", "rl"), ("test", "test")))  # fmt: skip
    (tmp_path / "mine.yaml").write_text(f"extends: quickstart\nname: mine\ndata:\n{lines}")
    return tmp_path


def test_a_recipe_names_the_sources_and_all_are_checked(study):
    done = rlcs("data", "check", "--recipe", "mine.yaml", cwd=study)
    assert done.returncode == 0, done.stdout + done.stderr
    heads = [line for line in done.stdout.splitlines() if line.endswith(".jsonl")]
    assert heads == ["cold_start: cold.jsonl", "rl: rl.jsonl", "test: test.jsonl"]
    assert done.stdout.endswith("`rlcs run` accepts this data\n")


def test_what_a_run_would_refuse_is_refused(study):
    jsonl(study / "rl.jsonl", [chart(study, i, (640, 480)) for i in range(3)])
    jsonl(study / "cold.jsonl", [chart(study, 9)])
    alone = rlcs("data", "check", "rl.jsonl", cwd=study)
    assert alone.returncode == 0 and "set prompt.max_tokens in your recipe" in alone.stdout
    done = rlcs("data", "check", "--recipe", "mine.yaml", "--json", cwd=study)
    facts = json.loads(done.stdout)
    assert done.returncode == 2 and not facts["accepted"]
    assert "the prompt has" in facts["sources"]["rl"]["bad"][0]["reason"]
    assert "set prompt.max_tokens=" in facts["sources"]["rl"]["refusal"]
    assert "the built-in teacher does not know" in facts["sources"]["cold_start"]["bad"][0]["reason"]
    refused = rlcs("run", "mine.yaml", cwd=study)
    assert refused.returncode == 2 and "3 of 3 rows cannot become prompts" in refused.stderr
    # With what the message says, the check accepts the data.
    raised = rlcs("data", "check", "rl.jsonl", "--recipe", "mine.yaml", "prompt.max_tokens=500", cwd=study)
    assert raised.returncode == 0, raised.stdout


def test_overlap_of_training_and_test_is_part_of_the_check(study):
    shared = json.loads((study / "test.jsonl").read_text().splitlines()[0])
    jsonl(study / "rl.jsonl", [shared, *(chart(study, i) for i in range(100, 170))])
    done = rlcs("data", "check", "--recipe", "mine.yaml", cwd=study)
    assert done.returncode == 0 and "1 of 71 rows of rl are also in test" in done.stdout, done.stdout
    refused = rlcs("data", "check", "data.overlap=refuse", "--recipe", "mine.yaml", cwd=study)
    assert refused.returncode == 2 and "`rlcs run` refuses this data" in refused.stdout


def test_wrong_words_are_refused_with_the_near_ones(study):
    for words, near in (
        (("rl.jsonl", "--role", "cold_strat"), "cold_start"),
        (("rl.jsonl", "--recipe", "quikstart"), "quickstart"),
        (("rl.jsonl", "data.max_bad_shar=1"), "data.max_bad_share"),
        ((), "--recipe"),
        (("--recipe", "mine.yaml", "--write", "x.jsonl"), "one source"),
    ):
        done = rlcs("data", "check", *words, cwd=study)
        assert done.returncode == 2 and near in done.stderr, (words, done.stderr)


def test_demonstrations_are_graded(study):
    rows = [{**chart(study, i), "response": rf"So \boxed{{{i + i // 2}}}"} for i in range(4)]
    jsonl(study / "cold.jsonl", rows)
    done = rlcs("data", "check", "cold.jsonl", "--role", "cold_start", cwd=study)
    assert (
        done.returncode == 2
        and "2 rows (first: cold.jsonl:3, :4): for example the final answer '3'" in done.stdout
    )
    assert "2 of 4 demonstrations left out" in done.stdout
    kept = rlcs("data", "check", "cold.jsonl", "--role", "cold_start", "teacher.keep=all", cwd=study)
    assert kept.returncode == 0 and "2 of 4 demonstrations trained on all the same" in kept.stdout
    for word in ("data.answers=as_given",):
        given = rlcs("data", "check", "cold.jsonl", "--role", "cold_start", word, cwd=study)
        assert given.returncode == 0 and "4 of 4 demonstrations not checked" in given.stdout


# --- --write -------------------------------------------------------------------------------------


def problems_of(path, role="cold_start"):
    loaded = load(str(path), Data(), decode_limit=10**7, role=role)
    return [
        (
            r.problem.history,
            r.problem.question,
            r.problem.answer,
            r.response,
            [i.sha256 for i in r.problem.images],
        )
        for r in loaded.rows
    ]


@pytest.mark.parametrize("target", ["good.jsonl", "below/good.jsonl", "../good.jsonl"])
def test_good_rows_are_written_as_they_were(study, target):
    folder = study / "data"
    rows = [{**chart(folder, i), "response": rf"\boxed{{{i}}}", "note": {"deep": [i]}} for i in range(4)]
    rows[1]["answer"], rows[2]["images"] = "7", ["img/none.png"]
    jsonl(folder / "rows.jsonl", rows)
    words = ("data", "check", "rows.jsonl", "--role", "cold_start")
    done = rlcs(*words, "--write", target, cwd=folder)
    assert done.returncode == 2 and f"2 rows are written to {target}" in done.stdout, done.stderr
    written = folder / target
    again = rlcs("data", "check", written, "--role", "cold_start", cwd=study)
    assert again.returncode == 0 and "2 rows can be used, 0 cannot" in again.stdout
    assert problems_of(written) == [
        each for i, each in enumerate(problems_of(folder / "rows.jsonl")) if i != 1
    ]
    first = json.loads(written.read_text().splitlines()[0])
    assert first.keys() == rows[0].keys() and first["note"] == {"deep": [0]}


def test_good_rows_of_parquet_are_written_with_their_images(study):
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "blue").save(buffer, "PNG")
    picture = {"bytes": buffer.getvalue(), "path": None}
    table = [
        {
            "id": "a",
            "problem": "Which?",
            "answer": "A",
            "options": ["x", "y"],
            "images": [picture],
            "level": 3,
        },
        {
            "id": "b",
            "problem": "Which?",
            "answer": "F",
            "options": ["x", "y"],
            "images": [picture],
            "level": 4,
        },
        {"id": "c", "problem": "Where?", "answer": "5", "options": None, "images": [], "level": 5},
    ]
    pq.write_table(pa.Table.from_pylist(table), study / "rows.parquet")
    done = rlcs("data", "check", "rows.parquet", "--write", "out/good.jsonl", cwd=study)
    assert done.returncode == 2 and "2 rows are written" in done.stdout, done.stdout + done.stderr
    again = rlcs("data", "check", "good.jsonl", cwd=study / "out")
    assert again.returncode == 0 and "2 rows can be used, 0 cannot" in again.stdout
    assert (
        problems_of(study / "out/good.jsonl", "rl")[0][4] == problems_of(study / "rows.parquet", "rl")[0][4]
    )
    assert [json.loads(line)["level"] for line in (study / "out/good.jsonl").open()] == [3, 5]


def test_conversations_and_paths_in_texts_are_written_so_that_they_are_read_again(study):
    chat = [
        {"role": "user", "content": "<image>What is this?"},
        {"role": "assistant", "content": "A chart."},
        {"role": "user", "content": "How many bars?"},
        {"role": "assistant", "content": r"I see \boxed{3}."},
    ]
    named = [{"role": "user", "content": "<img>img/2.png</img>How many?"}, chat[3]]
    for number in (1, 2):
        image_file(study / f"data/img/{number}.png", (30, 20 + number))
    rows = [
        {"messages": chat, "images": ["img/1.png"], "solution": "3"},
        {"messages": named, "solution": "3"},
    ]
    jsonl(study / "data/rows.jsonl", [*rows, {"messages": []}])
    (study / "data/list.json").write_text(json.dumps([*rows, {"messages": []}]))
    before = problems_of(study / "data/rows.jsonl")
    assert len(before) == 2
    for source in ("rows.jsonl", "list.json"):
        target = study / source / "out/good.jsonl"
        done = rlcs(
            "data", "check", study / "data" / source, "--role", "cold_start", "--write", target, cwd=study
        )
        assert "2 rows are written" in done.stdout, done.stdout + done.stderr
        assert problems_of(target) == before
        again = rlcs("data", "check", target, "--role", "cold_start", cwd=study)
        assert again.returncode == 0, again.stdout


def test_nothing_is_overwritten(study):
    before = (study / "rl.jsonl").read_bytes()
    (study / "link.jsonl").symlink_to(study / "rl.jsonl")
    for target in ("rl.jsonl", "link.jsonl", "test.jsonl", "good.json"):
        done = rlcs("data", "check", "rl.jsonl", "--write", target, cwd=study)
        assert done.returncode == 2 and f"--write {target}: " in done.stderr
    (study / "folder").mkdir()
    jsonl(study / "folder" / "train.jsonl", [row("a", "1")])
    done = rlcs("data", "check", "folder", "--write", "folder/good.jsonl", cwd=study)
    assert done.returncode == 2 and "part of the source" in done.stderr
    assert (study / "rl.jsonl").read_bytes() == before
    bad = rlcs(
        "data", "check", jsonl(study / "bad.jsonl", [{"question": "?"}]), "--write", "g.jsonl", cwd=study
    )
    assert bad.returncode == 2 and "g.jsonl is not written" in bad.stdout and not (study / "g.jsonl").exists()


def test_ten_thousand_bad_rows_are_few_lines(study):
    rows = [
        {"id": f"r{i}", "question": "?", "answer": "1", "images": [f"img/x {i}.png"]} for i in range(10_000)
    ]
    jsonl(study / "many.jsonl", rows)
    done = rlcs("data", "check", "many.jsonl", cwd=study)
    assert done.returncode == 2 and len(done.stdout) < 1000, done.stdout[:3000]
    assert done.stdout.startswith("10,000 rows (first: many.jsonl:1, :2, :3): for example ")


def test_other_commands_take_the_share_of_bad_rows(study):
    jsonl(
        study / "mixed.jsonl", [*(row(f"r{i}", "1", question=f"q{i}?") for i in range(8)), {"question": "?"}]
    )
    exported, compared = (
        ("data", "export", "mixed.jsonl", "out"),
        ("data", "overlap", "mixed.jsonl", "rl.jsonl"),
    )
    for words in (exported, compared, ("look", "mixed.jsonl")):
        done = rlcs(*words, cwd=study)
        assert done.returncode == 2 and "data.max_bad_share=0.12" in done.stderr, done.stderr
        done = rlcs(*words, "data.max_bad_share=0.12", cwd=study)
        assert done.returncode == 0, done.stderr
