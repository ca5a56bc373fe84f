"""One file for everything: what is held out shares neither image nor question with what trains."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from rlcs.cli.main import app
from rlcs.data.loading import load
from rlcs.data.source_options import both_parts, read_options
from rlcs.data.sources import Role
from rlcs.errors import DataError
from rlcs.recipe.schema import Data


@pytest.fixture
def file(tmp_path):
    """ShareGPT rows: 20 images with three questions about each, then 20 questions without an image."""
    rows = []
    for number in range(20):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"{number}.png")
        for question in ("How many?", "Which colour?", "Why?"):
            rows.append({"images": [f"{number}.png"], "conversations": turns(f"<image>{question}", number)})
    rows += [{"conversations": turns(f"What is {number} + 1?", number + 1)} for number in range(20)]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def turns(question: str, answer: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is \\boxed{{{answer}}}."}]


def ids(source: str, role: Role = "rl") -> list[str]:
    return [row.problem.id for row in load(source, Data(), decode_limit=10**6, role=role).rows]


def test_the_parts_are_the_whole_and_share_no_image(file):
    train, test = ids(f"{file}?part=train"), ids(f"{file}?part=test", "test")
    assert sorted(train + test) == sorted(ids(str(file))) and not set(train) & set(test)
    problems = {r.problem.id: r.problem for r in load(str(file), Data(), decode_limit=10**6, role="rl").rows}
    images = [{ref.sha256 for name in part for ref in problems[name].images} for part in (train, test)]
    assert not images[0] & images[1]
    groups = {problems[name].images[0].sha256 if problems[name].images else name for name in test}
    assert len(groups) == 4, "a tenth of 20 images and 20 questions"


def test_the_order_of_the_rows_does_not_matter(file, tmp_path):
    rows = [{**row, "id": f"r{place}"} for place, row in enumerate(json.loads(file.read_text()))]
    file.write_text(json.dumps(rows))
    other = tmp_path / "turned.json"
    other.write_text(json.dumps(rows[::-1]))
    assert set(ids(f"{file}?part=test")) == set(ids(f"{other}?part=test"))


def test_every_role_has_the_same_parts(file):
    assert ids(f"{file}?part=train", "cold_start") == ids(f"{file}?part=train", "rl")


def test_another_share_and_at_least_one_row(file):
    assert len(ids(f"{file}?part=test&share=0.5")) > len(ids(f"{file}?part=test"))
    assert len(ids(f"{file}?part=test&share=0.001")) in (1, 3)


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("part=train&part=test", "option part needs one value"),
        ("response=", "option response needs one value"),
        ("prat=test", "unknown option 'prat'"),
        ("part=tset", "no part 'tset'"),
        ("share=0.2", "no part ''"),
        ("part=test&share=2", "share=2"),
    ],
)
def test_a_mistyped_part_is_named(file, query, fault):
    with pytest.raises(DataError, match=fault):
        load(f"{file}?{query}", Data(), decode_limit=10**6, role="rl")


def test_a_file_may_have_a_question_mark_in_its_name(file):
    asked = file.rename(file.with_name("how many?part=1.json"))
    assert len(ids(str(asked))) == 80


def test_other_options_stay_with_the_source():
    source, options = read_options("me/mine?split=val&part=test")
    assert source == "me/mine?split=val" and options.part is not None and options.part.name == "test"
    assert read_options("builtin:puzzles?count=3")[0] == "builtin:puzzles?count=3"
    assert both_parts("me/mine?split=val")["data.rl"] == "me/mine?split=val&part=train"


def test_one_file_is_enough_for_a_dry_run_of_all_stages(file, tmp_path):
    words = ["run", "quickstart", "--data", str(file), "--out", str(tmp_path / "run"), "--dry-run", "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "sharegpt.json?part=train" in done.output and "sharegpt.json?part=test" in done.output
    assert "also in" not in done.output, "no row of the test is trained on"


def test_a_source_names_the_column_of_its_responses(tmp_path):
    """As the paper's data needs it: a short answer without a box is a response there, and only there."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "2 + 3?", "answer": "It is five."}\n')
    (plain,) = load(str(path), Data(), decode_limit=1, role="cold_start").rows
    (named,) = load(f"{path}?response=answer", Data(), decode_limit=1, role="cold_start").rows
    assert plain.response is None and named.response == "It is five."
