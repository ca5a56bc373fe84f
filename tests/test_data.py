"""Data: every source becomes the same problems, and every bad row is named instead of raised."""

import io
import json
import os
import re
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlcs.data import loading as data
from rlcs.data.images import encoded_image
from rlcs.data.rows import demonstrated
from rlcs.data.stream import ProblemStream
from rlcs.errors import CheckpointError, DataError
from rlcs.recipe.schema import Columns, Data

LIMIT = 50_000_000
WORKED = "The left bar is 3 high and the right bar 4, so the sum is \\boxed{7}."


def png(color="red", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def write_jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def load(source, role="rl", *, decode_limit=LIMIT, check=False, **settings):
    return data.load(source, Data(**settings), decode_limit=decode_limit, role=role, decode=check)


def only_bad(loaded):
    """The one bad row, when every other row is fine."""
    assert len(loaded.bad) == 1
    return loaded.bad[0]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "images" / "b.png").write_bytes(png("blue", (20, 10)))
    return tmp_path


HISTORY = [
    {"role": "system", "text": "Be brief."},
    {"role": "user", "text": "<image>What is it?"},
    {"role": "assistant", "text": "A square."},
]


def conversation(**changes):
    row = {"question": "And <image> here?", "images": ["images/a.png", "images/b.png"], "answer": "red"}
    return {**row, "history": HISTORY, **changes}


def test_a_history_is_the_turns_before_the_question(folder):
    plain = conversation(history=None, question="Which?")
    note = conversation(history="of art", question="Which?")
    loaded = load(write_jsonl(folder, [conversation(), plain, note]))
    first, second, third = (row.problem for row in loaded.rows)
    assert [(turn.role, turn.text) for turn in first.history] == [
        (turn["role"], turn["text"]) for turn in HISTORY
    ]
    assert len(first.images) == 2 and second.history == third.history == ()
    assert third.metadata == {"history": "of art"}
    assert loaded.notes == ("1 row with a system prompt in the data, used instead of prompt.system",)


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (["a", "b"], "turn 1 must be a mapping"),
        ([{"role": "user", "text": 3}], "turn 1 must hold texts"),
        ([{"role": "tool", "text": "x"}], "turn 1 calls or is a tool"),
        (HISTORY[:2], "two user turns follow each other (turns 1 and 2)"),
        ([*HISTORY[1:], HISTORY[0]], "a system turn comes first"),
    ],
)
def test_a_history_that_is_none_is_a_bad_row(folder, history, reason):
    assert reason in only_bad(load(write_jsonl(folder, [conversation(history=history)]))).reason


def test_system_prompts_of_rows_can_be_left_out_and_are_counted(folder):
    rows = [conversation(id=str(n)) for n in range(2)] + [conversation(history=HISTORY[1:])]
    loaded = load(write_jsonl(folder, rows), system="recipe")
    assert all([turn.role for turn in row.problem.history] == ["user", "assistant"] for row in loaded.rows)
    assert loaded.notes == ("2 rows with a system prompt in the data, left out (data.system=recipe)",)
    pictured = [{"role": "system", "text": "See <image>"}, *HISTORY[1:]]
    row = conversation(history=pictured, question="Which?")
    assert load(write_jsonl(folder, [row])).rows
    assert "would lose" in only_bad(load(write_jsonl(folder, [row]), system="recipe")).reason


# ------------------------------------------------------------------------------ JSONL and JSON


def test_a_jsonl_row_becomes_a_problem(folder):
    row = {
        "id": "q1",
        "question": "Which is larger?",
        "images": ["images/a.png", "images/b.png"],
        "answer": "B",
        "choices": ["red", 5],
        "level": 2,
        "family": "bars",
        "notes": "x" * 1000,
        "nested": {"a": 1},
    }
    source = write_jsonl(folder, [row])
    loaded = load(source)
    assert loaded.bad == ()
    (only,) = loaded.rows
    problem = only.problem
    assert only.response is None
    assert (problem.id, problem.source, problem.question) == ("q1", source, "Which is larger?")
    assert (problem.answer, problem.choices) == ("B", ("red", "5"))
    assert [(i.width, i.height) for i in problem.images] == [(8, 6), (20, 10)]
    assert all(image.path and image.data is None for image in problem.images)
    assert problem.metadata == {"level": 2, "family": "bars"}


def test_rows_of_any_columns_are_read_alike_however_few_plans_are_kept(folder, monkeypatch):
    """What follows from a row's columns is kept for the next row: not for one with other empty cells."""
    rows = [
        {"problem": "a", "question": "b", "answer": "5", "level": 1},
        {"problem": "a", "question": " ", "answer": "5", "level": 2},
        {"problem": "a", "question": "b", "answer": "5", "level": 3, "solution": "6"},
        {"question": "b", "problem": "a", "answer": "5"},
    ]
    path = write_jsonl(folder, rows * 2)
    loaded = load(path)
    read = [(row.problem.question, row.problem.metadata) for row in loaded.rows]
    assert read[:4] == read[4:] and [question for question, _ in read[:4]] == ["b", "a", "b", "b"]
    assert [metadata for _, metadata in read[:4]] == [{"level": 1}, {"level": 2}, {"level": 3}, {}]
    monkeypatch.setattr("rlcs.data.rows._MAX_PLANS", 1)
    assert load(path) == loaded


def test_bom_crlf_and_no_last_line_end_are_fine(folder):
    line = b'{"question": "1 + 1?", "answer": "2"}'
    path = folder / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    loaded = load(str(path))
    assert [row.problem.id for row in loaded.rows] == ["1", "3"]


def test_a_json_list_is_counted_from_0(folder):
    rows = [{"question": "1 + 1?", "answer": 2, "image": "images/a.png"}, 7]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    loaded = load(str(folder / "rows.json"))
    assert [row.problem.id for row in loaded.rows] == ["0"]
    assert str(only_bad(loaded)) == f"{folder}/rows.json#1: a row must be a JSON object, not int"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("5", "5"),
        (5, "5"),
        (-3.0, "-3"),
        (0.25, "0.25"),
        (1e-7, "0.0000001"),
        (10.0, "10"),
        (1e16, "10000000000000000"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_numbers_are_answers_written_plainly(folder, answer, text):
    loaded = load(write_jsonl(folder, [{"question": "q", "answer": answer}]))
    assert [row.problem.answer for row in loaded.rows] == [text]


def good_row(**changes):
    row = {"id": "good", "question": "What colour?", "images": ["images/a.png"], "answer": "red", **changes}
    return {key: value for key, value in row.items() if value is not ...}


@pytest.mark.fault("data", "a bad row of each kind", "named; the others are read")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (good_row(id=""), "the id is empty"),
        (good_row(id="  "), "the id is empty"),
        (good_row(id=None), "the id is empty"),
        (good_row(id=True), "not bool True"),
        (good_row(id=["x"]), "not list"),
        (good_row(id="a\nb"), "printable"),
        (good_row(id="first"), "duplicate id 'first', first at .*rows.jsonl:1"),
        (good_row(question=...), "no question: none of question, problem, query"),
        (good_row(question=..., qestion="x"), "did you mean"),
        (good_row(question=""), "the question is empty"),
        (good_row(question=5), "the question must be a text, not int 5"),
        (good_row(question="\ud800"), "half a character"),
        (good_row(answer=...), "no answer: none of answer, solution"),
        (good_row(answer=""), "the answer is empty"),
        (good_row(answer=True), "a text or a number, not bool True"),
        (good_row(answer=None), "the answer is empty"),
        (good_row(question=None), "the question is empty"),
        (good_row(answer=[]), "the answer is empty"),
        (good_row(answer=[None]), "the answer is empty"),
        (good_row(answer={"a": 1}), "not dict"),
        (good_row(answer="C", choices=["1", "2"]), "the gold answer 'C' names no option"),
        (good_row(answer=0, choices=["red", "blue"]), "an index from 0 or from 1"),
        (good_row(answer="\\boxed{5"), "the last box is not closed"),
        (good_row(answer="so many words " * 20), "no answer is marked"),
        (good_row(answer=float("nan")), "the answer is empty"),
        (good_row(answer=float("inf")), "not float inf"),
        (good_row(choices="A"), "the choices must be a list"),
        (good_row(choices=[None]), "not NoneType"),
        (good_row(response=""), "the response is empty"),
        (good_row(response=3), "the response must be a text"),
        (good_row(images=["images/none.png"]), r"images/none\.png: the image is missing"),
        (good_row(images="../x.png"), "the path leaves"),
        (good_row(images="/etc/passwd"), "absolute image path .*data.image_root"),
        (good_row(images="http://host/x.png"), "URL"),
        (good_row(images=[7]), "a path or embedded bytes, not int 7"),
        (good_row(images=[None]), "not NoneType"),
        (good_row(images={"bytes": None, "path": None}), "an image must have a value in one of bytes"),
        (good_row(images=[["images/a.png"]]), "not list"),
        (good_row(question="<image>Which?", images=[]), "1 <image> slots but the row has 0 images"),
        (good_row(question="<image><image>Which?"), "2 <image> slots but the row has 1 images"),
        (good_row(question="<image>?", images=["images/a.png"] * 2), "1 <image> slots .* 2 images"),
        (b'{"id": "x", "question": "torn', "torn or invalid JSON: .* column"),
        (b'{"id": "x", "question": "\xff"}', "not UTF-8"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_and_the_others_survive(folder, row, reason):
    source = write_jsonl(folder, [good_row(id="first"), row, good_row(id="last")])
    loaded = load(source)
    assert [r.problem.id for r in loaded.rows] == ["first", "last"]
    bad = only_bad(loaded)
    assert bad.where == f"{source}:2"
    assert re.search(reason, bad.reason), bad.reason


def test_a_bad_row_carries_its_id(folder):
    loaded = load(write_jsonl(folder, [good_row(images="none.png")]))
    assert only_bad(loaded).id == "good"
    assert "(id good)" in str(only_bad(loaded))


def test_bad_images_are_bad_rows_and_damage_inside_is_found_by_check(folder):
    whole = png("green", (100, 100))
    damaged = bytearray(whole)
    damaged[60] ^= 0xFF
    (folder / "cut.png").write_bytes(whole[:-40])
    (folder / "damaged.png").write_bytes(damaged)
    (folder / "large.png").write_bytes(png(size=(101, 100)))
    (folder / "thin.png").write_bytes(png(size=(201, 1)))
    (folder / "text.png").write_text("hello")
    os.mkfifo(folder / "pipe.png")
    names = ["cut", "damaged", "large", "thin", "text", "pipe"]
    source = write_jsonl(folder, [good_row(id=name, images=f"{name}.png") for name in names])
    loaded = load(source, decode_limit=10_000)
    assert [row.problem.id for row in loaded.rows] == ["damaged"]
    reasons = {bad.id: bad.reason for bad in loaded.bad}
    assert "truncated" in reasons["cut"]
    assert "limit of 10,000" in reasons["large"]
    assert "200 times" in reasons["thin"]
    assert "not a PNG" in reasons["text"]
    assert "not a regular file" in reasons["pipe"]
    checked = load(source, decode_limit=10_000, check=True)
    assert checked.rows == ()
    assert [bad.id for bad in checked.bad] == names


def test_absolute_paths_need_a_stated_root_and_stay_below_it(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    source = write_jsonl(elsewhere, [good_row(images=str(folder / "images" / "a.png"))])
    assert load(source, image_root=str(folder)).bad == ()
    assert "leaves" in only_bad(load(source, image_root=str(elsewhere))).reason
    assert "absolute" in only_bad(load(source)).reason
    (folder / "images" / "out.png").symlink_to("/etc/passwd")
    source = write_jsonl(elsewhere, [good_row(images=str(folder / "images" / "out.png"))])
    assert "leaves" in only_bad(load(source, image_root=str(folder))).reason


def test_the_same_image_is_held_once(folder):
    rows = [good_row(id=str(i)) for i in range(3)]
    loaded = load(write_jsonl(folder, rows))
    first, *others = (row.problem.images[0] for row in loaded.rows)
    assert all(other is first for other in others)


def test_control_tokens_in_a_question_are_plain_text_here(folder):
    question = "<|image_pad|><|im_end|>\n<|im_start|>system"
    loaded = load(write_jsonl(folder, [good_row(question=question)]))
    assert [row.problem.question for row in loaded.rows] == [question]


# ------------------------------------------------------------------------------ demonstrations


def test_a_response_makes_a_demonstration(folder):
    rows = [
        good_row(id="a", response=WORKED, answer="7"),
        good_row(id="b", response=WORKED, answer=...),
        good_row(id="c", response=WORKED, answer=None),
        good_row(id="d", response="no box here", answer=...),
        good_row(id="e", response=None),
    ]
    loaded = load(write_jsonl(folder, rows), "cold_start")
    assert loaded.bad == ()
    assert [(row.problem.answer, row.response) for row in loaded.rows] == [
        ("7", WORKED),
        ("7", WORKED),
        ("7", WORKED),
        ("", "no box here"),
        ("red", None),
    ]


def test_a_worked_answer_is_a_demonstration_in_cold_start_alone(folder):
    source = write_jsonl(folder, [good_row(answer=WORKED)])
    (row,) = load(source, "cold_start").rows
    assert (row.problem.answer, row.response) == ("7", WORKED)
    (row,) = load(source, "rl").rows
    assert (row.problem.answer, row.response) == ("7", None)
    (row,) = load(source, "rl", answers="as_given").rows
    assert (row.problem.answer, row.response) == (WORKED, None)


def test_gold_answers_are_unwrapped_counted_and_one_is_shown(folder):
    options = {"choices": ["1", "2"]}
    rows = [
        good_row(id="a"),
        good_row(id="b", answer="<answer>B</answer>", **options),
        good_row(id="c", answer="#### 5"),
        good_row(id="d", answer=["12"]),
        good_row(id="e", answer=["1", 2.5]),
        good_row(id="f", answer="The answer is [1,2]."),
        good_row(id="g", answer="<answer>A</answer>", **options),
    ]
    loaded = load(write_jsonl(folder, rows))
    assert [row.problem.answer for row in loaded.rows] == ["red", "B", "5", "12", "1, 2.5", "[1,2]", "A"]
    (note,) = loaded.notes
    assert note == (
        "6 gold answers were unwrapped (<answer>: 2, list: 2, ####: 1, words: 1), "
        "e.g. row b: '<answer>B</answer>' is 'B'"
    )
    assert load(write_jsonl(folder, rows[:1])).notes == ()


def test_as_given_leaves_gold_answers_alone(folder):
    rows = [
        good_row(id="a", answer="<answer>B</answer>"),
        good_row(id="b", answer="C", choices=["1"]),
        good_row(id="c", answer="a long reference answer for a judge, " * 10),
    ]
    loaded = load(write_jsonl(folder, rows), answers="as_given")
    assert [row.problem.answer for row in loaded.rows] == [row["answer"] for row in rows]
    assert not loaded.bad and not loaded.notes


def test_a_demonstration_needs_no_gold_answer_that_can_be_matched(folder):
    rows = [
        good_row(id="a", response=WORKED, answer="\\boxed{5"),
        good_row(id="b", response="x", answer="#### 5"),
    ]
    loaded = load(write_jsonl(folder, rows), "cold_start")
    assert [row.problem.answer for row in loaded.rows] == ["\\boxed{5", "5"]


def test_the_answer_column_can_be_named_as_the_response(folder):
    source = write_jsonl(folder, [good_row(answer="short: \\boxed{7}")])
    columns = Columns(response=("answer",))
    (row,) = load(source, "cold_start", columns=columns).rows
    assert (row.problem.answer, row.response) == ("7", "short: \\boxed{7}")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (WORKED, "7"),
        ("First \\boxed{1} is wrong, so in the end it is \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{7}", None),
        ("$\\boxed{7}$ cm", None),
        ("the box of this long answer is never closed \\boxed{7", None),
        ("a long answer in many words but without any box", None),
    ],
)
def test_what_counts_as_a_worked_answer(answer, gold):
    assert demonstrated(answer) == gold


# ------------------------------------------------------------------------------ Parquet


def test_parquet_takes_images_as_structs_bytes_or_paths_single_or_list(folder):
    embedded = {"bytes": png("green", (5, 4)), "path": "ignored.png"}
    by_path = {"bytes": None, "path": "images/a.png"}
    for value, sizes in (
        (embedded, [(5, 4)]),
        ([embedded, by_path], [(5, 4), (8, 6)]),
        (png(), [(8, 6)]),
        ([png(), png("blue")], [(8, 6), (8, 6)]),
        ("images/b.png", [(20, 10)]),
        ([], []),
        (None, []),
    ):
        table = pa.Table.from_pylist([{"problem": "How many?", "images": value, "answer": "3"}])
        pq.write_table(table, folder / "rows.parquet")
        loaded = load(str(folder / "rows.parquet"), check=True)
        assert loaded.bad == ()
        (row,) = loaded.rows
        assert [(i.width, i.height) for i in row.problem.images] == sizes


def test_embedded_images_lie_in_a_folder_once_where_several_processes_read_them(folder):
    images = [{"bytes": png("green")}, {"bytes": png("blue")}, {"bytes": png("green")}]
    table = pa.Table.from_pylist(
        [{"problem": f"{n}?", "image": i, "answer": "3"} for n, i in enumerate(images)]
    )
    pq.write_table(table, folder / "rows.parquet")
    options = {"decode_limit": LIMIT, "role": "rl"}
    held = data.load(str(folder / "rows.parquet"), Data(), **options)
    stored = [data.load(str(folder / "rows.parquet"), Data(), **options, store=folder / "kept") for _ in "12"]
    assert stored[0].rows == stored[1].rows
    files = sorted((folder / "kept").iterdir())
    assert len(files) == 2 and {file.suffix for file in files} == {".png"}
    for row, kept in zip(held.rows, stored[0].rows, strict=True):
        (image,), (other,) = row.problem.images, kept.problem.images
        assert image.data and other.data is None
        assert encoded_image(other) == image.data and row.problem.digest == kept.problem.digest


@pytest.mark.fault("data", "bad rows of a parquet file", "named by number")
def test_parquet_names_bad_rows_by_number(folder):
    answers = pa.array([str(i) if i != 70 else None for i in range(150)])
    questions = pa.array([b"q" if i != 130 else b"\xff" for i in range(150)]).view(pa.string())
    pq.write_table(pa.table({"question": questions, "answer": answers}), folder / "rows.parquet")
    loaded = load(str(folder / "rows.parquet"))
    assert [bad.where.partition("#")[2] for bad in loaded.bad] == ["70", "130"]
    assert "the answer is empty" in loaded.bad[0].reason
    assert "cannot be decoded" in loaded.bad[1].reason
    assert len(loaded.rows) == 148
    assert loaded.rows[-1].problem.id == "149"


def test_parquet_numbers_are_answers(folder):
    table = pa.table({"question": ["q"] * 2, "answer": pa.array([Decimal("1.50"), Decimal("-3.00")])})
    pq.write_table(table, folder / "rows.parquet")
    assert [r.problem.answer for r in load(str(folder / "rows.parquet")).rows] == ["1.5", "-3"]


def test_a_missing_column_is_named_with_the_nearest_and_all_others(folder):
    pq.write_table(pa.table({"qestion": ["q"], "answr": ["1"]}), folder / "rows.parquet")
    with pytest.raises(DataError) as caught:
        load(str(folder / "rows.parquet"))
    message = str(caught.value)
    assert "no question column: none of question, problem, query" in message
    assert "data.columns.question=[NAME]; did you mean qestion? known: qestion, answr" in message
    columns = Columns(question=("qestion",))
    with pytest.raises(DataError, match="no answer column"):
        load(str(folder / "rows.parquet"), columns=columns)
    columns = Columns(question=("qestion",), answer=("answr",))
    assert len(load(str(folder / "rows.parquet"), columns=columns).rows) == 1


def test_demonstrations_in_parquet_need_no_answer_column(folder):
    pq.write_table(pa.table({"question": ["q"], "response": [WORKED]}), folder / "rows.parquet")
    assert len(load(str(folder / "rows.parquet"), "cold_start").rows) == 1
    with pytest.raises(DataError, match="no answer column"):
        load(str(folder / "rows.parquet"), "rl")


@pytest.mark.fault("data", "a damaged parquet file", "one sentence")
def test_a_damaged_parquet_file_is_one_error(folder):
    path = folder / "rows.parquet"
    rows = 2000
    pq.write_table(
        pa.table({"question": [f"q {i}" for i in range(rows)], "answer": ["1"] * rows}),
        path,
        row_group_size=500,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
            load(str(path))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read beyond row \d+"):
        load(str(path))


# ------------------------------------------------------------------------------ data sets


@pytest.fixture(scope="module")
def dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    damaged = bytearray(png("green", (50, 50)))
    damaged[60] ^= 0xFF
    rows = {
        "images": [
            [{"bytes": png(), "path": "a.png"}],
            [{"bytes": png("blue"), "path": None}] * 2,
            [{"bytes": bytes(damaged), "path": None}],
        ],
        "problem": ["<image>What colour?", "<image> or <image>?", "And this?"],
        "answer": ["red", WORKED, "green"],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_data_set_is_read_without_decoding(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"))
    source = str(tmp_path / "saved")
    loaded = load(source, "cold_start")
    assert loaded.bad == ()
    assert [row.problem.id for row in loaded.rows] == ["0", "1", "2"]
    assert [len(row.problem.images) for row in loaded.rows] == [1, 2, 1]
    assert [row.response for row in loaded.rows] == [None, WORKED, None]
    assert all(image.data for row in loaded.rows for image in row.problem.images)
    bad = only_bad(load(source, "cold_start", check=True))
    assert bad.where == f"{source}#2"
    assert "damaged" in bad.reason


def test_a_selection_is_numbered_as_it_is_shown(dataset, tmp_path):
    dataset.select([1, 0]).save_to_disk(str(tmp_path / "saved"))
    loaded = load(str(tmp_path / "saved"))
    assert [row.problem.question for row in loaded.rows] == ["<image> or <image>?", "<image>What colour?"]


def test_splits_follow_the_role_the_setting_and_the_source(dataset, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": dataset, "test": dataset.select([0]), "validation": dataset.select([0, 1])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    source = str(tmp_path / "saved")
    assert len(load(source, "rl").rows) == 3
    assert len(load(source, "test").rows) == 1
    assert len(load(source, "test", split="validation").rows) == 2
    assert len(load(f"{source}?split=validation", "test", split="train").rows) == 2
    with pytest.raises(DataError, match=r"no split valid\n.*did you mean validation"):
        load(f"{source}?split=valid")


def test_a_folder_of_parquet_files_is_a_data_set(dataset, tmp_path, monkeypatch):
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "data").mkdir(parents=True)
    dataset.to_parquet(str(tmp_path / "set" / "data" / "train-00000-of-00001.parquet"))
    loaded = load(str(tmp_path / "set"))
    assert [row.problem.answer for row in loaded.rows] == ["red", "7", "green"]
    with pytest.raises(DataError, match=r"no split test\n.*its splits are: train"):
        load(str(tmp_path / "set"), "test")


def test_a_damaged_saved_data_set_is_one_error(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"))
    for arrow in (tmp_path / "saved").glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="not a readable data set"):
        load(str(tmp_path / "saved"))


def test_a_hub_data_set_that_cannot_be_had_is_one_error(monkeypatch, tmp_path):
    config = pytest.importorskip("datasets.config")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match="nobody/nothing: this data set cannot be loaded"):
        load("nobody/nothing")


# ------------------------------------------------------------------------------ sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/absent.jsonl", "no such file"),
        ("{}/absent.json", "no such file"),
        ("{}/absent.parquet", "no such file"),
        ("{}/absent", "no such file or folder"),
        ("./absent", "no such file or folder"),
        ("absent", "builtin:NAME"),
        ("~nobody.here/rows.jsonl", "no such file"),
        ("", "the source is empty"),
        ("{}/images/a.png", "not a data file"),
        ("{}/folder.jsonl", "a folder"),
        ("{}/pipe.jsonl", "not a regular file"),
        ("{}/object.json", "holds one dict, not a list"),
        ("{}?splt=train", "did you mean split"),
        ("builtin:puzzles?cout=3", r"unknown option 'cout'\n.*did you mean count"),
        ("builtin:puzzles?count=0", "whole number from 1"),
        ("builtin:puzzles?count=ten", "count=ten"),
        ("builtin:puzzles?count=3&count=4", "count needs one value"),
        ("builtin:puzzles?count", "count needs one value"),
        ("builtin:puzzles?seed=-1", "seed=-1"),
        ("builtin:puzzles?split=tset", "did you mean test"),
        ("builtin:puzzles?levels=3-1", "levels=3-1"),
        ("builtin:puzzles?levels=1,1", "levels=1,1"),
        ("builtin:puzzles?levels=9", "level"),
        ("builtin:puzles", "puzles"),
        ("builtin:puzzles?families=nothing", "nothing"),
    ],
)
def test_a_source_that_cannot_be_used_says_what_to_do(folder, source, message):
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "object.json").write_text("{}")
    with pytest.raises(DataError, match=message) as caught:
        load(source.format(folder))
    assert "\n  -> " in str(caught.value)


def test_built_in_tasks_are_drawn_as_asked():
    rows = load("builtin:puzzles?count=6&seed=5&levels=1-2&split=test").rows
    assert len(rows) == 6
    assert {row.problem.metadata["level"] for row in rows} == {1, 2}
    assert all(row.response is None and row.problem.images[0].data for row in rows)
    assert rows == load("builtin:puzzles?count=6&seed=5&levels=1,2", "test").rows
    assert rows != load("builtin:puzzles?count=6&seed=5&levels=1,2", "rl").rows


def test_families_of_built_in_tasks_can_be_chosen():
    rows = load("builtin:puzzles?count=4&families=bars").rows
    assert {row.problem.metadata["family"] for row in rows} == {"bars"}


# ------------------------------------------------------------------------------ how much bad is too much


def test_require_usable_counts_the_share_and_shows_the_first(folder):
    rows = [good_row(id=str(i)) for i in range(92)] + [good_row(id="") for _ in range(8)]
    source = write_jsonl(folder, rows)
    loaded = load(source)
    data.require_usable(loaded, Data(max_bad_share=0.08))
    with pytest.raises(DataError) as caught:
        data.require_usable(loaded, Data(max_bad_share=0.07))
    message = str(caught.value)
    assert message.startswith(f"{source}: 8 of 100 rows cannot be used (allowed: 7.0%)")
    assert "8 rows (first: " in message and "rows.jsonl:93, :94, :95): the id is empty" in message
    assert "rlcs data check" in message and "data.max_bad_share=0.08" in message
    data.require_usable(loaded, Data(max_bad_share=0.08))


def test_nothing_usable_is_an_error_at_any_share(folder):
    loaded = load(write_jsonl(folder, [good_row(answer=None)]))
    with pytest.raises(DataError, match="1 of 1 rows"):
        data.require_usable(loaded, Data(max_bad_share=1.0))
    (folder / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="no rows"):
        data.require_usable(load(str(folder / "empty.jsonl")), Data())


# ------------------------------------------------------------------------------ the stream


@settings(deadline=None)
@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 2**63),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    stop=st.integers(0, 7),
)
def test_a_stream_resumes_exactly_and_deals_every_item_once_an_epoch(count, seed, sizes, stop):
    items = [f"item {i}" for i in range(count)]
    unbroken = ProblemStream(items, seed=seed)
    dealt = [unbroken.take(size) for size in sizes]
    assert [len(part) for part in dealt] == sizes
    flat = [item for part in dealt for item in part]
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == sorted(items)
    assert unbroken.epochs == pytest.approx(len(flat) / count)

    first = ProblemStream(items, seed=seed)
    before = [first.take(size) for size in sizes[:stop]]
    second = ProblemStream(items, seed=seed)
    second.restore(json.loads(json.dumps(first.state())))
    assert before + [second.take(size) for size in sizes[stop:]] == dealt


def test_the_order_is_fixed_for_all_time_and_changes_with_epoch_and_seed():
    stream = ProblemStream(range(8), seed=0)
    ahead = stream.peek(11)
    assert ahead == ProblemStream(range(8), seed=0).take(11) and stream.epochs == 0
    assert stream.take(8) == [1, 0, 2, 3, 7, 5, 4, 6]
    epochs = [tuple(stream.take(8)) for _ in range(5)]
    seeds = [tuple(ProblemStream(range(8), seed=seed).take(8)) for seed in range(5)]
    assert len({*epochs, *seeds}) == 10


def test_a_stream_refuses_nothing_and_a_cursor_of_other_data():
    with pytest.raises(DataError, match="no items"):
        ProblemStream([], seed=0)
    stream = ProblemStream([1, 2, 3], seed=0)
    state = stream.state()
    for wrong, message in (
        ({**state, "count": 4}, "number of rows was 4 .* is 3 now"),
        ({**state, "seed": 1}, "the seed was 1"),
        ({**state, "position": 9}, "out of range"),
        ({**state, "epoch": -1}, "out of range"),
        ({**state, "epoch": "0"}, "cannot be read"),
        ({}, "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            stream.restore(wrong)
    assert stream.state() == state
