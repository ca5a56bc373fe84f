"""Values of columns: filled ones count, choices in every form that people write, no message shows a file."""

import base64
import datetime
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from rlcs.data import loading
from rlcs.data.values import choices_of, is_filled, structured
from rlcs.recipe.schema import Data


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def load(tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(color))

    def load(*rows, role="rl", **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return loading.load(str(tmp_path / "rows.jsonl"), Data(**settings), decode_limit=10**6, role=role)

    return load


@pytest.fixture
def read(load):
    def read(role="rl", **row):
        loaded = load({"question": "q", "answer": "1", **row}, role=role)
        assert not loaded.bad, loaded.bad
        return loaded.rows[0]

    return read


# ------------------------------------------------------------------------------ the filled column counts

EMPTY = [None, "", "  ", [], {}, [None], [""], [[]], {"bytes": None, "path": None}, float("nan"), "[]", "{}"]


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_column_hides_no_other_of_its_group(read, empty):
    assert len(read(images=empty, image="a.png").problem.images) == 1
    assert len(read(images=["a.png"], image=empty).problem.images) == 1
    assert read(choices=empty, options=["1", "2"], answer="A").problem.choices == ("1", "2")
    assert read(answer=empty, solution="5").problem.answer == "5"
    assert read(question=empty, problem="p").problem.question == "p"
    assert read("cold_start", answer=empty, response="so \\boxed{7}").problem.answer == "7"


def test_filled_columns_that_differ_are_noted_and_the_first_counts(load, read):
    def notes(**row):
        return load({"question": "q", "answer": "1", **row}).notes

    assert read(answer="1", solution="2").problem.answer == "1"
    (note,) = load(*[{"question": "q", "answer": "1", "solution": "2"}] * 2).notes
    assert note.startswith("columns answer and solution differ, and answer counts (2 rows, first ")
    assert note.endswith("rows.jsonl:1)")
    assert (
        notes(query="other")
        and notes(images=["a.png"], image="b.png")
        and notes(choices=["1"], options=["2"])
    )
    assert not notes(query="q") and not notes(images=["a.png", "b.png"], image="b.png")
    assert not notes(choices=["1", "2"], options={"A": 1, "B": 2})
    assert not notes(solution="so it is $\\boxed{1}$") and not notes(solution="1.0")
    assert not notes(solution="a long text without a mark " * 9)


def test_an_image_in_a_column_that_is_not_read_is_noted(load):
    for value in ("a.png", ["a.png"], "x/y.JPG"):
        (note,) = load({"question": "q", "answer": "1", "img": value}).notes
        assert "column img holds an image and is not read: set data.columns.images=[img]" in note
    assert not load({"question": "q", "answer": "1", "img": "a.png", "image": "b.png"}).notes
    assert not load({"question": "q", "answer": "1", "img": "a.txt"}).notes


@pytest.mark.parametrize(
    ("value", "filled"), [*((each, False) for each in EMPTY), (0, True), (False, True), ("x", True)]
)
def test_what_is_filled(value, filled):
    assert is_filled(value) == filled


# ------------------------------------------------------------------------------ choices


@pytest.mark.parametrize(
    "value",
    [
        ["10", "12"],
        [10, 12.0],
        ["A. 10", "B. 12"],
        ["A) 10", "B) 12"],
        ["(A) 10", "(B) 12"],
        ["a: 10", "b: 12"],
        ["A、10", "B、12"],
        ["Ａ．10", "Ｂ．12"],
        ["A：10", "B：12"],
        ["（A）10", "（B）12"],
        ["[A] 10", "[B] 12"],
        ["**A.** 10", "**B.** 12"],
        ["**A**. 10", "**B**. 12"],
        ["Option A: 10", "Option B: 12"],
        {"A": "10", "B": 12},
        {"B": "12", "A": "10", "C": None},
        {"(a)": "10", "(b)": "12"},
        {"label": ["A", "B"], "text": ["10", "12"]},
        {"label": ["B", "A"], "text": ["12", "10"]},
        {"label": ["1", "2"], "text": ["10", "12"]},
        '["10", "12"]',
        "['10', '12']",
        "['10' '12']",
        "['10'\n '12']",
        '{"A": "10", "B": "12"}',
        "A. 10\nB. 12",
        "(A) 10\n\n(B) 12\n",
    ],
)
def test_choices_in_every_form(value):
    assert choices_of(value) == ("10", "12")


@pytest.mark.parametrize(
    "value",
    [
        ["A", "B"],
        ["A. x", "y"],
        ["B. x", "C. y"],
        ["A. x", "C. y"],
        ["Apple", "Bread"],
        ["A.5", "2.5"],
        ["A、B", "B、C"],
        ["A - 5", "B - 5"],
    ],
)
def test_letters_that_are_not_consecutive_labels_stay(value):
    assert choices_of(value) == tuple(value)


def test_dates_and_times_are_choices():
    assert choices_of([datetime.date(2024, 5, 1), datetime.time(12, 30)]) == ("2024-05-01", "12:30:00")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("10 or 12", "must be a list"),
        ("A. 10", "must be a list"),
        (7, "must be a list"),
        ({"A": "1", "C": "2"}, "letters A, B"),
        ({"x": "1"}, "letters A, B"),
        ({"label": ["B", "C"], "text": ["1", "2"]}, "letters A, B"),
        ({"label": ["A"], "text": ["1", "2"]}, "not as many labels"),
        (["1"] * 27, "27 choices"),
        ([["1"]], "a text or a number"),
    ],
)
def test_choices_that_cannot_be_read(value, reason):
    with pytest.raises(ValueError, match=reason):
        choices_of(value)


def test_an_option_with_its_letter_is_graded_by_it_and_shown_once(read):
    problem = read(options=["A) x", "B) y"], answer="<answer>B</answer>").problem
    assert (problem.answer, problem.question_with_choices) == ("B", "q\n(A) x\n(B) y")
    assert read(options=["A) x", "B) y"], answer="B) y").problem.answer == "B) y"


def test_only_lists_and_mappings_are_read_out_of_texts():
    assert structured("[1, 2") == "[1, 2" and structured("[x]") == "[x]" and structured("7") == "7"
    assert structured('{"a": 1}') == {"a": 1} and structured("{'a': None}") == {"a": None}
    assert structured("[" * 100_000) == "[" * 100_000


# ------------------------------------------------------------------------------ gold answers


@pytest.mark.parametrize(
    ("gold", "options", "expected"),
    [
        ("<answer>B</answer>", ["A) x", "B) y"], "B"),
        ("<think>x</think><answer>B</answer>", ["x", "y"], "B"),
        ("so the sum is $\\boxed{5}$, as asked.", [], "5"),
        ("<answer>\\boxed{5}</answer>", [], "5"),
        ("2 and 3 are 5\n#### 5", [], "5"),
        ("The answer is 5.", [], "5"),
        ("\\boxed{\\frac{1}{2}}", [], "\\frac{1}{2}"),
    ],
)
@pytest.mark.parametrize("column", ["answer", "solution"])
def test_a_worked_or_marked_gold_answer_is_unwrapped(load, gold, options, expected, column):
    loaded = load({"problem": "q", "options": options, column: gold})
    assert [row.problem.answer for row in loaded.rows] == [expected], loaded.bad
    assert "gold answers were unwrapped" in loaded.notes[0]


def test_a_list_as_numpy_prints_it_is_several_texts(read):
    assert read(answer="['12' '14']").problem.answer == "12, 14"
    assert read(answer="['it''s']").problem.answer == "it, s"
    assert len(read(images="['a.png'\n 'b.png']").problem.images) == 2


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("\boxed{5}", "backslashes doubled"),  # a backspace: JSON of \\boxed with one backslash
        ("\frac{1}{2}", "backslashes doubled"),
        ("\text{A}", "backslashes doubled"),
        ("5\x00", "control character"),
        ("boxed{5}", "the mark around the answer is not complete"),
        (r"\\boxed{5}", "the mark around the answer is not complete"),
        ('{"answer": "5"}', "not dict of 1"),
    ],
)
def test_a_gold_answer_that_was_damaged_on_its_way_is_refused(load, gold, reason):
    (bad,) = load({"question": "q", "answer": gold}).bad
    assert reason in bad.reason and bad.reason.isprintable()


def test_half_a_character_anywhere_is_a_bad_row(load):
    for further in ({"level": "\ud800"}, {"\ud800": "easy"}):
        (bad,) = load({"question": "q", "answer": "1", **further}).bad
        assert "half a character" in bad.reason


@pytest.mark.parametrize("gold", ["C", "(C)", "c", "C. 13", "D"])
def test_a_gold_answer_that_names_no_option_is_a_fault_in_every_form_of_choices(load, gold):
    for choices in (["10", "12"], {"A": "10", "B": "12"}, "A. 10\nB. 12"):
        (bad,) = load({"question": "q", "choices": choices, "answer": gold}).bad
        assert "names no option: the 2 choices are A to B" in bad.reason


# ------------------------------------------------------------------------------ images

BASE64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "value",
    [
        "a.png",
        ["a.png"],
        {"path": "a.png"},
        [{"path": "a.png", "bytes": None}],
        {"image": "a.png"},
        {"url": "a.png"},
        {"image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        '["a.png"]',
        "['a.png']",
        '{"path": "a.png"}',
        BASE64,
        [BASE64],
        {"bytes": BASE64},
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/PNG;name=x;BASE64,{BASE64}",
        "data:;base64," + BASE64.rstrip("="),
        "\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76)),
        BASE64.replace("+", "-").replace("/", "_"),
        f" data:image/png;base64, {BASE64}",
        "data:image/png;base64," + BASE64.replace("/", "%2F").replace("+", "%2B"),
        f"image/png;base64,{BASE64}",
        f"b'{BASE64}'",
        f'"{BASE64}"',
    ],
)
def test_one_image_in_every_form(read, value):
    (image,) = read(image=value).problem.images
    assert (image.width, image.height) == (40, 30)


def test_a_jpeg_as_base64_is_no_absolute_path(read):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert text.startswith("/9j/") and len(read(image=text).problem.images) == 1


JUNK = "Q" * 200_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([JUNK], "a text of 200,000 characters: neither a path nor a Base64 image"),
        (JUNK + "!", "neither a path"),
        (f"data:image/png;base64,{JUNK}!", "not valid Base64"),
        (f"data:image/png;base64,{JUNK}", "not a PNG"),
        (f"data:image/png,{JUNK}", "not valid Base64"),
        ([{"bytes": list(png())}], "a list of .* numbers: write its bytes as Base64"),
        (list(png()), "a list of .* numbers"),
        ({"x" * 300: JUNK}, "an image must have a value in one of bytes, path"),
        (f"https://host/{JUNK}", "images must be files"),
        ("x/" * 400 + "a.png", "missing|too long"),
        ({"bytes": JUNK}, "neither a path"),
        ([[JUNK]], "not list of 1"),
        ("\x1b[31m.png", r"^\\x1b\[31m.png: the image is missing"),
    ],
)
def test_an_image_that_is_none_is_told_in_few_words(load, value, reason):
    (bad,) = load({"question": "q", "answer": "1", "images": value}).bad
    assert re.search(reason, bad.reason), bad.reason
    assert len(str(bad)) < 600


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "1", "images": [JUNK]},
        {"question": "q", "answer": "1", "image": f"data:image/png;base64,{JUNK}"},
        {"question": "q", "answer": "1", "id": JUNK},
        {"question": "q", "answer": [[JUNK]]},
        {"question": {"x": JUNK}, "answer": "1"},
        {"question": "q", "choices": JUNK, "answer": "1"},
        {"question": "q", "choices": ["1", "2"], "answer": JUNK},
        {JUNK: "q", "answer": "1"},
        {"messages": [{"role": JUNK, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": JUNK}]}]},
        {"messages": JUNK + "[", "answer": "1"},
    ],
)
def test_the_check_never_prints_the_content_of_a_file(tmp_path, row):
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    command = [sys.executable, "-m", "rlcs", "data", "check", "r.jsonl"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stdout + done.stderr) < 700, done.stdout[:2000]
    if row.get("images") == [JUNK]:
        assert len(done.stdout) < 500
