"""Layouts of other tools: each becomes the same problem, with turns, images and answers in their places."""

import base64
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlcs.data import loading
from rlcs.data.exchange import LAYOUTS as EXPORTED
from rlcs.data.exchange import export
from rlcs.data.layouts import LAYOUTS
from rlcs.data.rows import Row
from rlcs.errors import DataError
from rlcs.recipe.schema import Columns, Data
from rlcs.records import Problem, Turn

WORKED = "Three bars and four more, so the sum is \\boxed{7}."
PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "own-data.md"


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


BASE64 = base64.b64encode(png()).decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for name, color in (("0", "red"), ("1", "blue")):
        (tmp_path / "img" / f"{name}.png").write_bytes(png(color))
    return tmp_path


@pytest.fixture
def load(folder):
    def load(*rows, role="cold_start", **settings):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return loading.load(str(path), Data(**settings), decode_limit=10**6, role=role)

    return load


@pytest.fixture
def read(load):
    """The one row of a file with this row; it must be usable."""

    def read(row, **settings):
        loaded = load(row, **settings)
        assert not loaded.bad, loaded.bad
        return loaded.rows[0]

    return read


def user(*parts):
    return {"role": "user", "content": parts[0] if len(parts) == 1 else list(parts)}


def assistant(text):
    return {"role": "assistant", "content": text}


def text(words):
    return {"type": "text", "text": words}


HUMAN = {"from": "human", "value": "<image>\nHow many?"}
GPT = {"from": "gpt", "value": WORKED}
ONE_TURN = {
    "sharegpt": {"conversations": [HUMAN, GPT], "images": ["img/0.png"]},
    "llava": {"id": "7", "image": "img/0.png", "conversations": [HUMAN, GPT]},
    "conversation": {
        "conversation": [{"human": "<image>\nHow many?", "assistant": WORKED}],
        "image": "img/0.png",
    },
    "messages": {"messages": [user("<image>\nHow many?"), assistant(WORKED)], "images": ["img/0.png"]},
    "messages as text": {
        "messages": json.dumps([user("<image>\nHow many?"), assistant(WORKED)]),
        "images": '["img/0.png"]',
    },
    "as python prints it": {
        "messages": str([user("<image>\nHow many?"), assistant(WORKED)]),
        "images": "['img/0.png']",
    },
    "query": {
        "query": "<image>\nHow many?",
        "response": WORKED,
        "images": [{"path": "img/0.png", "bytes": None}],
    },
    "trl": {
        "prompt": [user({"type": "image"}, text("\nHow many?"))],
        "completion": [assistant([text(WORKED)])],
        "images": ["img/0.png"],
    },
    "trl text": {"prompt": "<image>\nHow many?", "completion": WORKED, "image": "img/0.png"},
    "alpaca": {"instruction": "<image>", "input": "How many?", "output": WORKED, "images": ["img/0.png"]},
    "texts": {
        "images": ["img/0.png"],
        "texts": [{"user": "<image>\nHow many?", "assistant": WORKED, "source": "x"}],
    },
    "qwen-vl": {
        "conversations": [{"from": "user", "value": "Picture 1: <img>img/0.png</img>\nHow many?"}, GPT],
    },
    "qwen marks": {
        "messages": [user("<|vision_start|><|image_pad|><|vision_end|>\nHow many?"), assistant(WORKED)],
        "images": ["img/0.png"],
    },
}


@pytest.mark.parametrize("name", ONE_TURN)
def test_a_question_with_its_answer_is_one_demonstration(read, name):
    row = read(ONE_TURN[name])
    assert (row.problem.question, row.response) == ("<image>\nHow many?", WORKED)
    assert row.problem.answer == "7" and row.problem.history == ()
    assert [image.width for image in row.problem.images] == [40]


@pytest.mark.parametrize("name", ONE_TURN)
def test_for_rl_the_last_turn_holds_the_gold_answer_and_is_no_response(read, name):
    row = read(ONE_TURN[name] | ({"answer": "7"} if name == "query" else {}), role="rl")
    assert (row.problem.answer, row.response) == ("7", None)


def test_a_column_of_ours_is_the_gold_answer_before_the_last_turn(read):
    row = read({**ONE_TURN["messages"], "solution": "<answer>8</answer>"}, role="rl")
    assert row.problem.answer == "8"
    row = read({**ONE_TURN["messages"], "solution": "8"})
    assert (row.problem.answer, row.response) == ("8", WORKED)


URL = f"data:image/png;base64,{BASE64}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": {"url": "data:IMAGE/PNG;charset=x;BASE64," + BASE64}},
        {"type": "image_url", "image_url": "img/0.png"},
        {"type": "image", "image": "img/0.png"},
        {"type": "image", "image": URL},
        {"type": "image", "image": BASE64},
        {"type": "image", "url": "img/0.png"},
        {"type": "image", "path": "img/0.png"},
        {"type": "image", "image": {"path": "img/0.png", "bytes": None}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"type": "input_image", "image_url": URL},
        {"image": "img/0.png"},
    ],
)
def test_an_image_in_a_message_stands_where_it_was(read, part):
    row = read({"messages": [user(text("Look at "), part, text(": how many?"))], "answer": "5"}, role="rl")
    assert row.problem.question == "Look at <image>: how many?"
    assert [(image.width, image.height) for image in row.problem.images] == [(40, 30)]


def test_an_absolute_path_in_a_message_needs_the_image_root(read, load, folder):
    path = {"type": "image", "image": f"file://{folder}/img/0.png"}
    row = {"messages": [user(path, text("How many?"))], "answer": "5"}
    assert "data.image_root" in load(row).bad[0].reason
    assert len(read(row, image_root=str(folder)).problem.images) == 1


def test_turns_before_the_last_question_are_its_history_with_their_images(read):
    row = read(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user({"type": "image", "image": "img/0.png"}, text("Colour?")),
                assistant("red"),
                user({"type": "image", "image": "img/1.png"}, text("And this?")),
                assistant("blue"),
                user("Which was first?"),
                assistant("red"),
            ]
        }
    )
    assert row.problem.history == (
        Turn(role="system", text="Be brief."),
        Turn(role="user", text="<image>Colour?"),
        Turn(role="assistant", text="red"),
        Turn(role="user", text="<image>And this?"),
        Turn(role="assistant", text="blue"),
    )
    assert (row.problem.question, row.response, len(row.problem.images)) == ("Which was first?", "red", 2)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q2", "response": "r2", "history": [["q1", "r1"]], "system": "S"},
        {"query": "q2", "response": "r2", "history": "[['q1', 'r1']]", "system": "S"},
        {"instruction": "q2", "output": "r2", "history": [["q1", "r1"]], "system": "S"},
        {"system": "S", "conversation": [{"human": "q1", "gpt": "r1"}, {"human": "q2", "gpt": "r2"}]},
        {"system_prompt": "S", "messages": [user("q1"), assistant("r1"), user("q2"), assistant("r2")]},
        {
            "question": "q2",
            "response": "r2",
            "history": [
                {"role": "system", "text": "S"},
                {"role": "user", "text": "q1"},
                {"role": "assistant", "text": "r1"},
            ],
        },
    ],
)
def test_system_messages_and_history_in_columns_of_their_own(read, row):
    read_row = read(row)
    roles = [(turn.role, turn.text) for turn in read_row.problem.history]
    assert roles == [("system", "S"), ("user", "q1"), ("assistant", "r1")]
    assert (read_row.problem.question, read_row.response) == ("q2", "r2")


def test_the_reasoning_of_a_model_stays_before_its_answer(read):
    row = read({"messages": [user("q"), {**assistant("\\boxed{5}"), "reasoning_content": "2 + 3"}]})
    assert row.response == "<think>\n2 + 3\n</think>\n\n\\boxed{5}"
    assert read({"messages": [user("q"), {**assistant("5"), "reasoning_content": None}]}).response == "5"


def test_a_verl_row_has_its_answer_in_the_reward_model(read, folder):
    row = {
        "data_source": "geo3k",
        "prompt": [user("<image>How many?")],
        "images": [{"bytes": png(), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "\\boxed{7}"},
        "extra_info": {"split": "train", "index": 0, "question": "other"},
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
    loaded = loading.load(str(folder / "train.parquet"), Data(), decode_limit=10**6, role="rl")
    (only,) = loaded.rows
    assert (only.problem.question, only.problem.answer) == ("<image>How many?", "7")
    assert only.problem.metadata["data_source"] == "geo3k" and len(only.problem.images) == 1
    assert loaded.notes[0] == "1 row read as verl (prompt, reward_model)"
    as_text = {"prompt": "How many?", "reward_model": '{"ground_truth": 7}'}
    assert read(as_text, role="rl").problem.answer == "7"


def test_vlmevalkit_rows_have_choices_by_letter_and_may_share_an_image(folder):
    lines = [
        "index\timage\tquestion\thint\tA\tB\tC\tanswer\tcategory",
        f"5\t{BASE64}\tWhich?\tA bar is red.\tx\ty\t\tB\tbars",
        "6\t5\tWho?\t\tx\ty\tz\tC\tbars",
    ]
    (folder / "rows.tsv").write_text("\n".join(lines))
    loaded = loading.load(str(folder / "rows.tsv"), Data(), decode_limit=10**6, role="test")
    first, second = (row.problem for row in loaded.rows)
    assert (first.id, first.question, first.choices) == ("5", "A bar is red.\nWhich?", ("x", "y"))
    assert (second.id, second.choices, second.answer) == ("6", ("x", "y", "z"), "C")
    assert second.images == first.images and first.metadata == {"category": "bars"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no question"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no user turn"),
        ({"conversations": [GPT, HUMAN]}, "begins with an assistant turn"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, r"two user turns follow each other \(turns 1 and 2\)"),
        ({"messages": [user("q"), {"role": "tool", "content": "x"}]}, "turn 2 calls or is a tool"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "x"}]}, "turn 2 calls or is a tool"),
        (
            {"messages": [user("q"), {**assistant("x"), "tool_calls": [{"id": "1"}]}]},
            "turn 2 calls or is a tool",
        ),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role: str 'narrator'"),
        ({"messages": [{"content": "x"}]}, "turn 1 has no role"),
        ({"messages": ["x"]}, "turn 1 must be a mapping"),
        ({"messages": [user("")]}, "turn 1 is empty"),
        ({"messages": [user("q"), assistant(None)]}, "turn 2 is empty"),
        ({"messages": [user({"type": "video", "video": "x.mp4"}, text("q"))]}, "part of type str 'video'"),
        (
            {"messages": [user(text("q")), assistant([{"type": "image", "image": "img/0.png"}])]},
            "in the answer",
        ),
        (
            {
                "messages": [
                    user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, text("q"))
                ]
            },
            "images must be files",
        ),
        ({"messages": [user({"type": "image"}, text("q"))]}, "1 places for images, but the row has 0"),
        (
            {"messages": [user({"type": "image"}, text("q"))], "images": ["img/0.png", "img/1.png"]},
            "1 places for images, but the row has 2",
        ),
        ({"messages": [user("<image><image>q")], "images": ["img/0.png"]}, "2 <image> slots"),
        ({"messages": [user("q")], "videos": ["x.mp4"]}, "the row has videos"),
        ({"messages": [user("q")]}, "no answer"),
        ({"prompt": "q", "reward_model": "rule"}, "reward_model must be a mapping"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(load, row, reason):
    loaded = load({"answer": "1", **row} if reason != "no answer" else row, role="rl")
    assert not loaded.rows
    assert re.search(reason, loaded.bad[0].reason), loaded.bad[0].reason


def test_columns_of_ours_count_before_those_of_the_layout(read, load):
    row = {**ONE_TURN["messages"], "frage": "Wie viele?", "antwort": "9"}
    settings = {"columns": Columns(question=("frage",), answer=("antwort",))}
    problem = read(row, role="rl", **settings).problem
    assert (problem.question, problem.answer) == ("Wie viele?", "9")
    notes = load(row, role="rl", **settings).notes
    assert any(note.startswith("columns frage and messages differ, and frage counts") for note in notes)


def test_what_an_own_question_leaves_out_is_not_lost_in_silence(read, load):
    row = {"problem": "q2", "messages": [user("q1"), assistant("r1"), user("q2"), assistant("r2")]}
    assert [turn.text for turn in read(row).problem.history] == ["q1", "r1"]
    other = {**row, "problem": "q3"}
    assert read(other).problem.history == ()
    assert any("columns problem and messages differ" in note for note in load(other).notes)


def test_a_second_conversation_in_a_row_is_noted(load):
    row = {"messages": [user("q"), assistant(WORKED)]}
    again = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": WORKED}]}
    other = {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": WORKED}]}
    alpaca = {"instruction": "q", "output": WORKED, "history": [["a", "b"]]}
    assert not any("differ" in note for each in (row | again, alpaca) for note in load(each).notes)
    (note,) = [note for note in load(row | other).notes if "differ" in note]
    assert note.startswith("columns messages and conversations differ, and messages counts")


def test_an_image_in_a_message_counts_before_a_column_and_says_so(load, read):
    part = {"type": "image_url", "image_url": {"url": "img/1.png"}}
    row = {"messages": [user(part, text("q")), assistant(WORKED)], "images": ["img/0.png"]}
    assert read(row).problem.images[0].path.endswith("1.png")
    assert any("columns messages and images differ, and messages counts" in note for note in load(row).notes)


def test_rows_that_share_an_id_are_told_apart_as_llava_has_them(load):
    loaded = load(ONE_TURN["llava"], ONE_TURN["llava"])
    assert [row.problem.id for row in loaded.rows] == ["7", "7#2"]
    assert any("the id of another row comes again" in note for note in loaded.notes)


def test_the_layout_is_noted_once_with_a_count(load):
    loaded = load(*(ONE_TURN["sharegpt"] for _ in range(3)), {"question": "q", "answer": "1"})
    assert loaded.notes == ("3 rows read as ShareGPT or LLaVA (conversations)",)


def test_a_parquet_file_of_messages_needs_no_question_column(folder):
    row = {"messages": [user("q"), assistant(WORKED)]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    loaded = loading.load(str(folder / "rows.parquet"), Data(), decode_limit=10**6, role="cold_start")
    assert [row.response for row in loaded.rows] == [WORKED]
    pq.write_table(pa.table({"frage": ["q"]}), folder / "rows.parquet")
    with pytest.raises(DataError, match="no question column"):
        loading.load(str(folder / "rows.parquet"), Data(), decode_limit=10**6, role="cold_start")


@pytest.mark.parametrize("layout", EXPORTED)
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_exported_is_read_back(read, tmp_path, layout, whole):
    shown = read(
        {"question": "Which <image>?", "images": ["img/0.png"], "choices": ["x", "y"], "answer": "B"}
    )
    rows = [
        Row(problem=shown.problem, response=f"{WORKED} That is the second: \\boxed{{B}}"),
        Row(
            problem=Problem(id="b", source="s", question="2+3?", answer="5"),
            response=f"{WORKED} \\boxed{{5}}",
        ),
    ]
    export(rows, tmp_path / "out", layout=layout, source="here")
    source = tmp_path / "out" if whole else next((tmp_path / "out").rglob("train*"))
    loaded = loading.load(str(source), Data(), decode_limit=10**6, role="cold_start")
    assert not loaded.bad
    assert [row.response for row in loaded.rows] == [row.response for row in rows]
    assert [row.problem.question for row in loaded.rows] == [r.problem.question_with_choices for r in rows]
    assert [row.problem.answer for row in loaded.rows] == ["B", "5"]
    assert all(row.gradable for row in loaded.rows) or layout == "published"  # which has no column for it
    assert [[i.sha256 for i in row.problem.images] for row in loaded.rows] == [
        [i.sha256 for i in row.problem.images] for row in rows
    ]


def examples():
    """Every row of the how-to page, with the part of the page in which it stands."""
    blocks = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("row", examples(), ids=lambda row: next(iter(row)))
def test_the_rows_of_the_how_to_page_are_read(read, folder, row):
    for name in ("7", "8", "10a", "10b"):
        (folder / "img" / f"{name}.png").write_bytes(png())
    problem = read(row).problem
    assert bool(problem.images) == ("img/" in json.dumps(row))
    assert read(row, role="rl").problem.answer in ("3", "4", "B", "12", "The red one.")


def test_every_layout_is_in_the_how_to_page():
    page = PAGE.read_text(encoding="utf-8")
    for layout in LAYOUTS:
        assert all(f"`{name}`" in page for name in layout.needs), layout.name
