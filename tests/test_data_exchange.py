"""Data in other people's layouts, there and back; and what two sets have in common."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from conftest import make_conversation, rlcs
from rlcs.data import puzzles
from rlcs.data.exchange import export
from rlcs.data.images import image_from_bytes
from rlcs.data.loading import load
from rlcs.data.overlap import OverlapFinder, find_overlaps
from rlcs.data.rows import Row
from rlcs.errors import RunFolderError
from rlcs.recipe.schema import Data
from rlcs.records import Problem, Turn
from rlcs.storage import read_jsonl


def demonstrations():
    drawn = puzzles.load("puzzles", split="train", count=6, seed=5)
    rows = [Row(problem=p, response=puzzles.teach(p, seed=0, wrong_share=0.0)) for p in drawn]
    asked = Problem(
        id="c",
        source="mine",
        question="Look at <image>: which?",
        answer="B",
        images=drawn[0].images,
        choices=("x", "y"),
    )
    text = "I look at the picture, and I see that it is the second one: \\boxed{B}"
    return [*rows, Row(problem=asked, response=text)]


def read(path, **columns):
    return load(str(path), Data(columns=columns), decode_limit=10**6, role="cold_start").rows


def test_the_published_layout_comes_back_as_it_went(tmp_path: Path):
    rows = demonstrations()
    (readme, parquet) = export(rows, tmp_path / "out", layout="published", source="here")
    again = read(parquet, response=("answer",))  # some responses are short: no rule would guess them
    assert [row.response for row in again] == [row.response for row in rows]
    assert [row.problem.answer for row in again] == [row.problem.answer for row in rows]
    assert [[i.data for i in row.problem.images] for row in again] == [
        [i.data for i in r.problem.images] for r in rows
    ]
    assert again[-1].problem.question == "Look at <image>: which?\n(A) x\n(B) y"
    assert again[0].problem.question == "<image>" + rows[0].problem.question
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=str(parquet), split="train", cache_dir=str(tmp_path / "c")
    )
    assert loaded.column_names == ["images", "problem", "answer"] and loaded[0]["images"][0].size == (84, 84)
    assert (
        "7 rows, 7 of them demonstrations" in readme.read_text()
        and "path: data/*.parquet" in readme.read_text()
    )
    with pytest.raises(RunFolderError, match="not empty"):
        export(rows, tmp_path / "out", layout="published", source="here")


def test_conversations_are_exported_whole(tmp_path: Path):
    problem = make_conversation("talk", system="Be brief.", choices=("four", "five"))
    rows = [Row(problem=problem, response="It is \\boxed{A}"), demonstrations()[0]]
    asked = "Now <image> all together?\n(A) four\n(B) five"
    for layout in ("published", "ms-swift", "llama-factory"):
        export(rows, tmp_path / layout, layout=layout, source="here")
    swift, plain = read_jsonl(tmp_path / "ms-swift/train.jsonl")
    assert (swift["system"], swift["query"]) == ("Be brief.", asked)
    assert swift["history"] == [
        ["<image>How many are red?", "I count two.\n\\boxed{2}"],
        ["And in <image> here?", "Three: \\boxed{3}"],
    ]
    assert not {"system", "history"} & plain.keys() and len(swift["images"]) == 3
    talk = read_jsonl(tmp_path / "llama-factory/train.jsonl")[0]["conversations"]
    assert [turn["from"] for turn in talk] == ["system", "human", "gpt", "human", "gpt", "human", "gpt"]
    assert "".join(turn["value"] for turn in talk).count("<image>") == 3
    first, second = read(tmp_path / "published/data/train-00000-of-00001.parquet", response=("answer",))
    assert (first.problem.history, first.problem.question) == (problem.history, asked)
    assert first.response == rows[0].response and second.problem.history == ()
    assert [ref.sha256 for ref in first.problem.images] == [ref.sha256 for ref in problem.images]


def test_images_without_slots_begin_the_first_turn_of_an_export(tmp_path: Path):
    history = (Turn(role="user", text="What is it?"), Turn(role="assistant", text="A square."))
    problem = replace(demonstrations()[0].problem, question="Sure?", history=history)
    export([Row(problem=problem, response="Yes")], tmp_path / "out", layout="ms-swift", source="here")
    [line] = read_jsonl(tmp_path / "out/train.jsonl")
    assert line["history"] == [["<image>What is it?", "A square."]] and line["query"] == "Sure?"


def test_only_the_same_conversation_is_the_same_problem():
    one, other = make_conversation("a"), make_conversation("a")
    edited = replace(
        other, id="b", history=(replace(other.history[0], text="<image>How?"), *other.history[1:])
    )
    kinds = {found.a: found.kind for found in find_overlaps([replace(other, id="c"), edited], [one])}
    assert kinds == {"c": "same problem", "b": "same image"}
    system = make_conversation("a", system="Be brief.")
    assert find_overlaps([one], [replace(system, id="d")])[0].kind == "same problem"


@pytest.mark.parametrize("layout", ["ms-swift", "llama-factory"])
def test_layouts_of_other_trainers(layout, tmp_path: Path):
    rows = demonstrations()
    export(rows, tmp_path / "out", layout=layout, source="here")
    lines = read_jsonl(tmp_path / "out/train.jsonl")
    for line, row in zip(lines, rows, strict=True):
        asked, said = (
            (line["query"], line["response"])
            if layout == "ms-swift"
            else [turn["value"] for turn in line["conversations"]]
        )
        assert said == row.response and asked.count("<image>") == len(line["images"]) == 1
        assert (tmp_path / "out" / line["images"][0]).read_bytes() == row.problem.images[0].data
    assert len(list((tmp_path / "out/images").iterdir())) == 6  # one image is shared
    if layout == "ms-swift":  # `query`, `response` and `images` are columns that rlcs itself knows
        assert [row.response for row in read(tmp_path / "out/train.jsonl")] == [row.response for row in rows]
    else:
        info = json.loads((tmp_path / "out/dataset_info.json").read_text())
        assert info["rlcs"]["columns"]["messages"] == "conversations"


def test_commands_export_and_list_what_would_be_sent(tmp_path: Path):
    done = rlcs("data", "export", "builtin:puzzles?count=3", tmp_path / "out", "--layout", "ms-swift")
    assert done.returncode == 0 and "3 rows" in done.stdout, done.stderr
    listed = rlcs("data", "push", tmp_path / "out", "me/mine", "--dry-run")
    assert (
        listed.returncode == 0
        and "README.md" in listed.stdout
        and "in 5 files would go to me/mine" in listed.stdout
    )
    assert rlcs("data", "push", tmp_path, "me/mine").returncode == 2
    wrong = rlcs("data", "export", "builtin:puzzles?count=3", tmp_path / "b", "--layout", "ms-swfit")
    assert wrong.returncode == 2 and "did you mean ms-swift" in wrong.stderr


# --- overlap --------------------------------------------------------------------------------------


def picture(seed, *, size=(200, 160), form="PNG", **options):
    rng = random.Random(seed)
    image = Image.new("RGB", (200, 160), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.randrange(160), rng.randrange(120)
        pen.rectangle(
            (x, y, x + rng.randrange(20, 60), y + rng.randrange(20, 60)),
            fill=tuple(rng.choices(range(256), k=3)),
        )
    buffer = io.BytesIO()
    image.resize(size).save(buffer, form, **options)
    return image_from_bytes(buffer.getvalue(), limit=10**6, where="drawn")


def problem(name, question, *images):
    return Problem(id=name, source="mine", question=question, answer="1", images=images)


def test_what_two_sets_share_is_found_and_nothing_else():
    small = picture(1, size=(120, 96), form="JPEG", quality=70)
    train = [
        problem("a", "How many <image> boxes?", picture(1)),
        problem("b", "What is 1+1?"),
        problem("c", "Which is red?", picture(2)),
        problem("d", "How many boxes?", small),
        problem("e", "How many boxes?", picture(3)),
    ]
    test = [
        problem("A", "how many  BOXES", picture(1)),
        problem("B", "What is 1 + 1 ?"),
        problem("C", "Which is blue?", picture(2)),
        problem("E", "How many boxes?", picture(4)),
    ]
    found = [(each.kind, each.a, each.b) for each in find_overlaps(train, test)]
    assert found == [
        ("same problem", "a", "A"),
        ("same question", "b", "B"),
        ("same image", "c", "C"),
        ("near image", "d", "A"),
    ]


def test_pixels_count_not_files_and_signs_count_not_punctuation():
    bmp, other = picture(1, form="BMP"), picture(2, form="BMP")
    train = [
        problem("copy", "how many boxes", bmp),
        problem("rephrased", "Count the boxes.", bmp),
        problem("elsewhere", "How many boxes?", other),
        problem("minus", "What is $3 - 5$?"),
        problem("plus", r"What is \(3 + 5\)"),
        problem("point", "What is 3.5?"),
    ]
    test = [
        problem("T", "How many boxes?", picture(1)),
        problem("M", "What is 3+5 ?"),
        problem("P", "What is 35?"),
    ]
    for finder in (OverlapFinder(test), OverlapFinder(test, look_alikes=True)):
        found = [(each.kind, each.a, each.b) for each in finder.find(train)]
        assert found == [
            ("same problem", "copy", "T"), ("same question", "plus", "M"), ("same image", "rephrased", "T"),
        ]  # fmt: skip


def test_earlier_turns_and_choices_belong_to_the_question():
    first = Problem(id="a", source="m", question="And now?", answer="1", choices=("x", "y"))
    asked = replace(first, history=(Turn(role="user", text="Look."), Turn(role="assistant", text="Yes.")))
    others = [replace(first, choices=("x", "z")), asked]
    assert not OverlapFinder([first]).find(others)
    assert [each.b for each in OverlapFinder(others).find([replace(asked, id="b")])] == ["a"]


def test_one_line_for_a_row_however_many_rows_it_meets():
    rows = [problem(str(i), "Why?") for i in range(3000)]
    found = OverlapFinder(rows).find(rows)
    assert len(found) == 3000 and {(each.b, each.more) for each in found} == {("0", 2999)}


def test_decoding_is_bounded_except_where_every_problem_must_be_found():
    train = [problem(f"a{i}", "How many?", picture(i)) for i in range(6)]
    test = [problem(f"b{i}", "How many?", picture(i, form="BMP")) for i in range(6)]
    limit = 200 * 160 * 8
    few = OverlapFinder(test, all_problems=False, max_pixels=limit)
    assert [each.a for each in few.find(train)] == ["a0", "a1"] and few.uncompared == 4
    every = OverlapFinder(test, max_pixels=limit)
    assert len(every.find(train)) == 6 and not every.uncompared


def test_an_image_that_cannot_be_decoded_is_compared_by_its_bytes():
    broken = replace(picture(1), data=picture(1).data[:300], sha256="0" * 64)
    found = OverlapFinder([problem("b", "q", picture(1)), problem("c", "q", broken)]).find(
        [problem("a", "q", broken)]
    )
    assert [(each.kind, each.b) for each in found] == [("same problem", "c")]


def test_unlike_pictures_are_far_apart():
    many = [problem(str(seed), f"q{seed}", picture(seed)) for seed in range(100)]
    assert not [each for each in find_overlaps(many, many) if each.a != each.b]


def test_the_builtin_splits_do_not_meet():
    train = puzzles.load("puzzles", split="train", count=150, seed=1)
    test = puzzles.load("puzzles", split="test", count=150, seed=3)
    kinds = {each.kind for each in find_overlaps(train, test)}
    assert "same problem" not in kinds and "same image" not in kinds


def test_the_command_reports_overlaps(tmp_path: Path):
    done = rlcs("data", "overlap", "builtin:shapes?count=4", "builtin:shapes?count=4")
    assert done.returncode == 0 and "4 of 4 rows of builtin:shapes?count=4 are also in" in done.stdout, (
        done.stderr
    )
    lines = rlcs("data", "overlap", "builtin:shapes?count=4", "builtin:shapes?count=4", "--json").stdout
    assert sum(json.loads(line)["kind"] == "same problem" for line in lines.splitlines()) == 4
    assert rlcs("data", "overlap", "builtin:shapes?count=4", "benchmark:nosuch").returncode == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "Why?", "answer": "for many reasons " * 20}) + "\n")
    found = rlcs("data", "overlap", rows, rows, "--json")
    assert json.loads(found.stdout.splitlines()[0])["kind"] == "same question", found.stderr
