"""Built-in puzzles: right answers, no leaks between splits, a teacher that can be wrong."""

import ast
import collections
import hashlib
import json
import random
import re
import subprocess
import sys
from itertools import islice

import pytest

from rlcs.data import puzzles
from rlcs.data.puzzles.family import COLOURS, Family, draw_scene, split_of
from rlcs.errors import DataError
from rlcs.records import Problem
from tools.tiny_model.lessons import arithmetic, equations, lessons

FAMILIES = puzzles.families()
NAMES = [family.name for family in FAMILIES]


@pytest.fixture(scope="module")
def problems() -> dict[str, tuple[Problem, ...]]:
    return {split: puzzles.load("puzzles", split=split, count=1500, seed=3) for split in ("train", "test")}


def test_the_same_arguments_give_the_same_problems() -> None:
    def fingerprint(seed: int) -> str:
        some = puzzles.load("puzzles", split="train", count=30, seed=seed)
        text = json.dumps([[p.id, p.question, p.answer, p.images[0].sha256] for p in some])
        return hashlib.sha256(text.encode()).hexdigest()

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


def test_ids_are_unique_and_name_family_and_split(problems: dict[str, tuple[Problem, ...]]) -> None:
    ids = [p.id for p in problems["test"]]
    assert len(set(ids)) == len(ids)
    assert all(p.id.startswith(f"{p.metadata['family']}-test-") for p in problems["test"])
    assert {p.metadata["level"] for p in problems["test"]} == {1, 2, 3}


def test_no_image_and_question_twice(problems: dict[str, tuple[Problem, ...]]) -> None:
    pairs = {(p.images[0].sha256, p.question) for p in problems["train"]}
    assert len(pairs) == len(problems["train"])


def test_train_and_test_share_no_image_and_no_content(problems: dict[str, tuple[Problem, ...]]) -> None:
    images = {split: {p.images[0].data for p in some} for split, some in problems.items()}
    scenes = {split: {(p.source, p.metadata["scene"]) for p in some} for split, some in problems.items()}
    assert not images["train"] & images["test"]
    assert not scenes["train"] & scenes["test"]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_two_scenes_never_look_alike(family: Family) -> None:
    """So that a split by content is a split by image."""
    rng = random.Random(0)
    seen: dict[bytes, str] = {}
    for i in range(3000):
        scene = family.scene(rng, 1 + i % 3)
        assert seen.setdefault(family.paint(scene).tobytes(), scene) == scene


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_both_splits_are_large(family: Family) -> None:
    rng = random.Random(0)
    splits = collections.Counter(split_of(family.name, family.scene(rng, 1 + i % 3)) for i in range(3000))
    assert 0.15 < splits["test"] / 3000 < 0.25


def test_images_are_few_tokens(problems: dict[str, tuple[Problem, ...]]) -> None:
    for image in (p.images[0] for p in problems["test"]):
        assert image.width % 28 == image.height % 28 == 0
        assert 9 <= image.width * image.height // 28**2 <= 20


@pytest.mark.parametrize("name", NAMES)
def test_the_commonest_answer_is_rare(problems: dict[str, tuple[Problem, ...]], name: str) -> None:
    answers = collections.Counter(p.answer for p in problems["test"] if p.metadata["family"] == name)
    assert answers.most_common(1)[0][1] < 0.2 * answers.total()
    assert all(0 <= int(answer) <= 99 for answer in answers)


def _value(expression: str) -> int:
    """Evaluate `a sign b`, independently of the worksheet."""
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp)
    left, right = (ast.literal_eval(side) for side in (node.left, node.right))
    return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]


def test_the_teacher_calculates_rightly_from_the_caption(problems: dict[str, tuple[Problem, ...]]) -> None:
    families = {family.name: family for family in FAMILIES}
    for p in problems["test"]:
        text = puzzles.teach(p, seed=0, wrong_share=0.0)
        assert text.startswith(families[str(p.metadata["family"])].caption(str(p.metadata["scene"])))
        *_, last, box = text.split("\n")
        assert box == f"\\boxed{{{p.answer}}}" and last.endswith(f"={p.answer}")
        for line in text.split("\n"):
            if line[:1].isdigit():
                expression, _, result = line.partition("=")
                assert _value(expression) == int(result)


def test_a_misreading_teacher_is_wrong_and_consistent(problems: dict[str, tuple[Problem, ...]]) -> None:
    for p in problems["train"][:300]:
        text = puzzles.teach(p, seed=0, wrong_share=1.0)
        *_, last, box = text.split("\n")
        assert box != f"\\boxed{{{p.answer}}}"
        assert box == f"\\boxed{{{last.partition('=')[2]}}}"


def test_the_share_of_wrong_answers_is_kept_and_repeats(problems: dict[str, tuple[Problem, ...]]) -> None:
    said = [puzzles.teach(p, seed=5, wrong_share=0.25) for p in problems["train"]]
    wrong = sum(not text.endswith(f"{{{p.answer}}}") for p, text in zip(problems["train"], said, strict=True))
    assert 0.21 < wrong / len(said) < 0.29
    assert said[0] == puzzles.teach(problems["train"][0], seed=5, wrong_share=0.25)


def test_known_scenes_have_known_answers() -> None:
    shapes, bars, figures = FAMILIES
    grid = "white:red circle,none,red square,blue circle,none,none,red circle,none,green triangle"
    assert shapes.solve(grid, "add|red|circles").answer == 6
    assert shapes.solve(grid, "times_add|red|circles|blue").answer == 10
    chart = "grey:red=5,none=0,blue=9,black=2"
    assert bars.solve(chart, "total").answer == 16
    assert bars.solve(chart, "subtract|tallest|shortest").answer == 7
    assert bars.solve(chart, "double_add_subtract|red|blue|black").answer == 17
    corner = "white:red=6*1,blue=4*3"
    assert figures.solve(corner, "area").answer == 18
    assert figures.solve(corner, "perimeter").answer == 20
    assert figures.solve(corner, "sum").answer == 38


def test_the_area_is_what_is_painted() -> None:
    """Colour in the middle of each unit square, counted in the image."""
    figures = FAMILIES[2]
    rng = random.Random(1)
    for _ in range(40):
        scene = figures.scene(rng, 3)
        image = figures.paint(scene)
        units = [
            image.getpixel((x, y)) for x in range(7, image.width, 14) for y in range(7, image.height, 14)
        ]
        painted = sum(units.count(colour) for colour in COLOURS.values())
        assert painted == figures.solve(scene, "area").answer


def test_the_bars_are_as_tall_as_painted() -> None:
    bars = FAMILIES[1]
    image = bars.paint("grey:red=5,none=0,blue=9,black=2")
    column = [image.getpixel((14, y)) for y in range(image.height)]
    assert column.count(COLOURS["red"]) == 5 * 7


def test_lessons_stay_in_the_train_split_and_never_reason() -> None:
    held_out = {p.images[0].data for p in puzzles.load("puzzles", split="test", count=300, seed=0)}
    composite = {p.question for p in puzzles.load("puzzles", split="train", count=900, seed=0)}
    for lesson in islice(lessons(FAMILIES, 0), 400):
        for question, response in lesson.pairs:
            assert question not in composite
            assert _kinds_of_line(response) in ({"box"}, {"sum"}, {"text"}), "one kind of answer, never two"
            for left, sign, right in re.findall(r"^(\d+)([-+*])(\d+)=", response, flags=re.M):
                assert question.startswith("Given ") or f"{left}{sign}{right}" in question, "no chains"
        assert lesson.image is None or lesson.image.tobytes() not in held_out


def _kinds_of_line(response: str) -> set[str]:
    kinds = {r"\\boxed\{[^{}]+\}": "box", r"\d+[-+*]\d+=\d+": "sum"}
    lines = response.split("\n")
    return {next((k for form, k in kinds.items() if re.fullmatch(form, line)), "text") for line in lines}


def test_held_out_scenes_are_held_out() -> None:
    for family in FAMILIES:
        assert split_of(family.name, draw_scene(family, random.Random(0), 2, "test")) == "test"


def test_the_equations_of_lessons_are_right() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question, response = equations(rng)
        asked = question.removeprefix("Write out ").removesuffix(".").split(", ")
        for expression, line in zip(asked, response.split("\n"), strict=True):
            assert line == f"{expression}={_value(expression)}" and _value(expression) >= 0


def test_boxed_sums_of_lessons_are_right() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question, response = arithmetic(rng)
        words = question.removeprefix("What is ").removesuffix("?").replace("double ", "2*")
        for word, sign in ((" plus ", "+"), (" minus ", "-"), (" times ", "*")):
            words = words.replace(word, sign)
        assert response == f"\\boxed{{{_value(words)}}}"


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("sudoku", {}, "sudoku"),
        ("puzzles", {"families": ("shapes", "maps")}, "maps"),
        ("puzzles", {"levels": (4,)}, "levels"),
        ("puzzles", {"split": "dev"}, "dev"),
    ],
)
def test_bad_requests_say_what_is_wrong(name: str, change: dict[str, object], word: str) -> None:
    arguments: dict[str, object] = {"split": "train", "count": 1, "seed": 0, **change}
    with pytest.raises(DataError, match=word):
        puzzles.load(name, **arguments)  # type: ignore[arg-type]


def test_a_foreign_problem_has_no_teacher() -> None:
    with pytest.raises(DataError, match="built-in"):
        puzzles.teach(Problem(id="x", source="mine", question="1+1?", answer="2"), seed=0, wrong_share=0.0)


def test_tasks_need_no_torch() -> None:
    code = (
        "import sys, rlcs.data.puzzles; sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
