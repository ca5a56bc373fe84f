"""The benchmarks: official layouts in small, official files where they are, and the published metrics."""

import json
import os
import re
from pathlib import Path

import pytest

from conftest import draw
from rlcs.errors import DataError, UserError
from rlcs.evals.benchmarks import find, list_benchmarks, mathverse, mathvista, wemath
from rlcs.evals.benchmarks.base import Question
from rlcs.evals.benchmarks.loading import load_benchmark
from rlcs.evals.scores import Verdict, averaged, chance_level, pass_at, rule_scores

LIMIT = 50_000_000
OFFICIAL = Path(os.environ.get("RLCS_BENCHMARKS", Path(__file__).parents[2] / "shared" / "benchmarks"))
"""Official files of the benchmarks, which may not be copied into this repository."""
with_official_files = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"no official benchmark files at {OFFICIAL} (set RLCS_BENCHMARKS)"
)

VISTA = {
    "pid": "1",
    "question": "How long is it?",
    "image": "images/1.png",
    "choices": None,
    "unit": "cm",
    "precision": 1.0,
    "answer": "1.2",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {
        "language": "english",
        "source": "SciBench",
        "category": "math-targeted-vqa",
        "task": "textbook question answering",
        "context": "scientific figure",
        "grade": "college",
        "skills": ["scientific reasoning", "arithmetic reasoning"],
    },
}
VERSE = {
    "sample_index": "1",
    "problem_index": "1",
    "problem_version": "Text Dominant",
    "question": "Find x.\nChoices:\nA:40\u00b0\nB:50\u00b0\nC:60\u00b0",
    "image": "images_version_1-4/image_1.png",
    "answer": "B",
    "question_type": "multi-choice",
    "metadata": {"split": "testmini", "subject": "Plane Geometry", "subfield": "Angle"},
    "query_cot": "Please first conduct reasoning.\nQuestion: Find x.",
    "question_for_eval": "Find x.\nChoices:\nA:40\u00b0\nB:50\u00b0\nC:60\u00b0",
}


def vision(number, **changes):
    row = {
        "id": str(number),
        "question": "Which one?\n<image1>",
        "options": ["1", "2", "3", "4", "5"],
        "answer": "D",
        "image": f"images/{number}.png",
        "level": 2,
        "subject": "algebra",
    }
    return {**row, **changes}


def we(problem, key, **changes):
    row = {
        "ID": problem,
        "key": key,
        "question": "How many?",
        "option": "A. 300;B. 400; C. shape ;C.; D. No correct answer",
        "answer": "B",
        "image_path": f"2steps/image/{key}.png",
    }
    return {**row, **changes}


def write_jsonl(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(path: Path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw(56, 42, seed=seed).data)


def vision_folder(folder: Path, count=3, **changes) -> Path:
    """MATH-Vision's layout: testmini.jsonl and images/."""
    write_jsonl(folder / "testmini.jsonl", [vision(i, **changes) for i in range(count)])
    for i in range(count):
        write_image(folder / "images" / f"{i}.png", seed=i)
    return folder


def load(name, folder, **changes):
    given = {"split": None, "data": folder, "limit": None, "decode_limit": LIMIT, **changes}
    return load_benchmark(find(name), **given)


# ------------------------------------------------------------------------------------ layouts


def test_five_benchmarks_are_found_by_themselves():
    known = list_benchmarks()
    assert list(known) == ["geometry3k", "mathverse", "mathvision", "mathvista", "wemath"]
    assert {name: next(iter(b.splits.items())) for name, b in known.items()} == {
        "geometry3k": ("test", 601),
        "mathverse": ("testmini", 3940),
        "mathvision": ("test", 3040),
        "mathvista": ("testmini", 1000),
        "wemath": ("testmini", 1740),
    }
    with pytest.raises(UserError, match="did you mean mathvista"):
        find("mathvsta")


def test_mathvision_in_its_own_layout(tmp_path):
    vision_folder(tmp_path / "mathvision")
    loaded = load("mathvision", tmp_path, split="testmini")
    question, images = loaded.questions[0]
    assert len(loaded.questions) == 3 and loaded.of == 304 and (images[0].width, images[0].height) == (56, 42)
    assert question.official == (
        'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple '
        'choice question, only one letter is allowed in the "\\boxed{}".\nWhich one?\n<image1>'
        "\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) 5\n"
    )
    assert question.plain.startswith("Which one?\n<image>\n(A) 1")
    assert question.facets["level_and_subject"] == ("level 2, algebra",)
    assert (
        question.graded().choices == ("1", "2", "3", "4", "5")
        and not question.problem("paper", images).choices
    )
    assert len(load("mathvision", tmp_path / "mathvision", split="testmini", limit=2).questions) == 2


def test_mathvision_lists_no_options_that_stand_in_the_picture():
    read = find("mathvision").read
    assert "(A)" not in read(vision(1, options=list("ABCDE"))).official
    several = read(vision(1, question="<image1> or <image2>?"))
    assert several.plain.startswith("<image1> or <image2>?")  # one merged picture: it comes first
    only = read(vision(1, question="<image1>", options=[]))
    assert only.plain == "<image>" and only.graded().question == "[image]"


def test_mathvista_in_its_own_layout(tmp_path):
    several = {
        **VISTA,
        "pid": "2",
        "choices": ["Yes", "No"],
        "unit": None,
        "answer": "No",
        "question_type": "multi_choice",
        "answer_type": "text",
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "testmini.json").write_text(json.dumps({"1": VISTA, "2": several}))
    write_image(tmp_path / "images" / "1.png")
    first, second = (question for question, _ in load("mathvista", tmp_path).questions)
    assert first.official == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place "
        "and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How long is it? (Unit: cm)"
    )
    assert first.facets["skills"] == ("scientific reasoning", "arithmetic reasoning")
    assert second.official.endswith("at the end.\nQuestion: How long is it?\nChoices:\n(A) Yes\n(B) No")
    assert chance_level([first, second]) == 0.25


def test_mathverse_in_its_own_layout(tmp_path):
    only = {**VERSE, "sample_index": "2", "problem_version": "Vision Only", "question": ""}
    free = {**VERSE, "sample_index": "3", "question_type": "free-form", "answer": "4.4 m"}
    (tmp_path / "testmini.json").write_text(json.dumps([VERSE, only, free]))
    write_image(tmp_path / "images" / "images_version_1-4" / "image_1.png")
    first, second, third = (question for question, _ in load("mathverse", tmp_path).questions)
    assert first.choices == ("40\u00b0", "50\u00b0", "60\u00b0") and first.official == VERSE["query_cot"]
    assert second.plain == "Please answer the question that is shown in the image."
    assert third.num_options == 0 and third.choices == ()
    assert first.facets["subfield"] == ("Plane Geometry, Angle",)
    assert mathverse.options_of("A: is a point, B too") == ()


def test_geometry3k_as_parquet_shards(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [
        {
            "images": [{"bytes": draw(30, 30, seed=i).data, "path": None}],
            "problem": f"<image>Find x{i}.",
            "answer": "2 \\sqrt { 221 }",
        }
        for i in range(4)
    ]
    (tmp_path / "data").mkdir()
    for shard in range(2):
        table = pyarrow.Table.from_pylist(rows[2 * shard : 2 * shard + 2])
        write_table(table, tmp_path / "data" / f"test-{shard:05}-of-00002.parquet")
    loaded = load("geometry3k", tmp_path)
    assert [question.id for question, _ in loaded.questions] == ["0", "1", "2", "3"]
    question, images = loaded.questions[3]
    assert images[0].width == 30 and question.problem("official", images).question.startswith(
        "<image>Find x3. You"
    )


def test_wemath_in_its_own_layout(tmp_path):
    keys = ("2steps_1", "2steps_2", "2steps_multi")
    (tmp_path / "testmini.json").write_text(json.dumps([we("2steps_7", key) for key in keys]))
    for key in keys[:2]:
        write_image(tmp_path / "images" / "2steps" / "image" / f"{key}.png")
    loaded = load("wemath", tmp_path)
    question = loaded.questions[0][0]
    assert question.id == "2steps_7/2steps_1" and question.num_options == 4
    assert question.choices == ("300", "400", "shape ;C.", "No correct answer")
    assert "<Answer>: <<your option>>" in question.official and question.plain.startswith("How many?\nA. 300")
    (missing,) = loaded.missing
    assert missing.id == "2steps_7/2steps_multi" and "2steps_multi.png" in str(missing)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "testmini.jsonl").unlink(), "there is no testmini.jsonl"),
        (lambda f: (f / "testmini.jsonl").write_text('{"id": 1}\n'), "column 'question' is missing"),
        (lambda f: write_jsonl(f / "testmini.jsonl", [vision(1, answer="")]), "is empty"),
        (lambda f: write_jsonl(f / "testmini.jsonl", [vision(1, image=None)]), "the row has no image"),
        (lambda f: (f / "testmini.jsonl").write_text("{torn\n"), "JSON"),
        (lambda f: (f / "testmini.jsonl").write_text(""), "no questions"),
        (lambda f: write_jsonl(f / "testmini.jsonl", [vision(1), vision(1)]), "comes twice"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "none of 3 questions has its image"),
        (
            lambda f: write_jsonl(f / "testmini.jsonl", [vision(1, image="../../secret.png")]),
            "none of 1 questions has its image",
        ),
    ],
)
def test_a_spoilt_folder_is_refused_by_name(tmp_path, spoil, message):
    folder = vision_folder(tmp_path / "own")
    spoil(folder)
    with pytest.raises((DataError, UserError), match=message) as caught:
        load("mathvision", folder, split="testmini")
    assert str(folder) in str(caught.value) and "->" in str(caught.value)


def test_wrong_split_and_folder():
    with pytest.raises(UserError, match="known: test, testmini"):
        load("mathvision", Path(), split="tset")
    with pytest.raises(UserError, match="no such folder"):
        load("mathvision", Path("nowhere"))


def test_a_damaged_image_is_set_aside(tmp_path):
    folder = vision_folder(tmp_path)
    (folder / "images" / "1.png").write_bytes(b"not a picture")
    loaded = load("mathvision", folder, split="testmini")
    assert len(loaded.questions) == 2 and loaded.missing[0].id == "1"


def test_the_example_of_the_how_to_is_a_benchmark():
    page = Path(__file__).parents[1] / "docs" / "how-to" / "add-a-benchmark.md"
    space: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1], space)  # noqa: S102
    row = {
        "id": 1,
        "question": "How many?",
        "options": [3, 4],
        "answer": "A",
        "place": "hall",
        "colours": ["red"],
    }
    question = space["BENCHMARK"].read(row)
    assert question.plain == "How many?\n(A) 3\n(B) 4" and question.facets["colours"] == ("red",)


# ------------------------------------------------------------------------------------ scores


def we_verdicts(problems):
    verdicts = []
    for number, (steps, whole) in enumerate(problems):
        size = len(steps)
        rights = {
            **{f"{size}steps_{i + 1}": right for i, right in enumerate(steps)},
            f"{size}steps_multi": whole,
        }
        verdicts += [(wemath.read(we(f"p{number}", key)), right) for key, right in rights.items()]
    return verdicts


def test_four_dimensions_by_hand():
    scores = wemath.metrics(
        we_verdicts(
            [
                ((True, True), True),  # CM in both
                ((True, False), True),  # RM strict, CM loose
                ((False, False, False), True),  # RM in both
                ((True, True, True), False),  # IG
                ((True, False), False),  # IK
            ]
        )
    )
    assert scores["strict_score"] == pytest.approx((1 + 0.5) / 5)
    assert scores["loose_score"] == pytest.approx((2 + 0.5) / 5)
    assert scores["strict_RM"] == pytest.approx(2 / 3) and scores["loose_RM"] == pytest.approx(1 / 3)
    assert (scores["strict_IK"], scores["strict_IG"], scores["strict_CM"]) == (0.2, 0.2, 0.2)


def test_four_dimensions_leave_incomplete_problems_out_and_divide_by_nothing():
    verdicts = we_verdicts([((True, True), False)])
    assert wemath.metrics(verdicts)["strict_RM"] is None
    assert wemath.metrics(verdicts[:2]) == {
        **dict.fromkeys(wemath.metrics(verdicts), None), "problems": 0.0,
    }  # fmt: skip
    assert averaged([{"a": None, "b": 1.0}, {"a": 2.0, "b": 2.0}]) == {"a": 2.0, "b": 1.5}


def test_pass_at_k_counts_subsets():
    assert pass_at(4, 0, 2) == 0.0 and pass_at(4, 4, 1) == 1.0 and pass_at(4, 3, 2) == 1.0
    assert pass_at(4, 1, 2) == pytest.approx(0.5) and pass_at(10, 3, 1) == pytest.approx(0.3)


def test_samples_of_a_question_are_one_question():
    questions = [
        Question(id=str(i), official="?", plain="?", answer="1", facets={"kind": ("a", "b")[: i + 1]})
        for i in range(2)
    ]
    verdicts = [
        Verdict(question=questions[0], index=i, correct=correct)
        for i, correct in enumerate([True, True, False, None])
    ] + [Verdict(question=questions[1], index=i, correct=False) for i in range(4)]
    scores = rule_scores(find("mathvision"), verdicts, samples=4)
    assert scores["accuracy"] == 0.25 and scores["unscored"] == 1
    assert scores["pass_at"] == {"1": 0.25, "2": pytest.approx(5 / 12), "4": 0.5}
    assert scores["by"]["kind"] == {"a": {"accuracy": 0.25, "n": 2}, "b": {"accuracy": 0.0, "n": 1}}
    assert scores["low"] < 0.25 < scores["high"] and scores["high"] - scores["low"] > 0.6


# ------------------------------------------------------------------------------------ official files


@with_official_files
def test_official_mathvision_files_and_totals():
    loaded = load("mathvision", OFFICIAL, split="testmini")
    assert len(loaded.questions) == 304 and not loaded.missing
    assert chance_level([question for question, _ in loaded.questions]) == pytest.approx(190 / 5 / 304)
    read = find("mathvision").read
    questions = [read(json.loads(line)) for line in (OFFICIAL / "mathvision" / "test.jsonl").open()]
    assert all(question.graded().question for question in questions)
    assert len(questions) == 3040 and sum(bool(question.num_options) for question in questions) == 1532
    flags = {}
    for path in (OFFICIAL / "mathvision" / "published").glob("*CoT.jsonl"):
        flags = {row["id"]: row["correct"] for row in map(json.loads, path.open())}
        totals = json.loads(path.with_name(path.stem + "_result.json").read_text())
    verdicts = [Verdict(question=q, index=0, correct=flags[q.id]) for q in questions]
    by = rule_scores(find("mathvision"), verdicts, 1)["by"]
    checked = 0
    for name, published in totals.items():
        facet = name.removeprefix("-").replace("level", "level ").replace("_", ", ")
        found = next((each[facet] for each in by.values() if facet in each), None)
        if found is not None:
            right = round(found["accuracy"] * found["n"])
            assert published.startswith(f"{right}/{found['n']}="), name
            checked += 1
    assert checked >= 16 + 5 + 60


@with_official_files
def test_official_mathvista_words_and_category_scores():
    rows = json.loads((OFFICIAL / "mathvista" / "output_bard.json").read_text())
    questions = {pid: mathvista.read({**row, "pid": pid}) for pid, row in rows.items()}
    # In 15 published queries the choices stand in another order than in the column, which is what is graded.
    same = [questions[pid].official == row["query"] for pid, row in rows.items()]
    assert len(same) == 1000 and sum(same) == 985
    verdicts = [Verdict(question=questions[pid], index=0, correct=r["true_false"]) for pid, r in rows.items()]
    scores = rule_scores(find("mathvista"), verdicts, 1)
    published = json.loads((OFFICIAL / "mathvista" / "scores_bard.json").read_text())
    assert scores["accuracy"] == pytest.approx(float(published["average"]["accuracy"]) / 100)
    assert len(scores["by"]) == 9
    for facet, values in scores["by"].items():
        assert set(values) == set(published[facet])
        for value, found in values.items():
            wanted = published[facet][value]
            assert (round(found["accuracy"] * found["n"]), found["n"]) == (wanted["correct"], wanted["total"])


@with_official_files
def test_official_wemath_file():
    rows = json.loads((OFFICIAL / "wemath" / "testmini.json").read_text())
    questions = [wemath.read(row) for row in rows]
    assert len({question.id for question in questions}) == 1740
    assert all(ord(q.answer) - ord("A") < q.num_options for q in questions)
    assert wemath.metrics([(question, True) for question in questions])["problems"] == 525
    loaded = load("wemath", OFFICIAL)
    assert (len(loaded.questions), len(loaded.missing), loaded.of) == (87, 1653, 1740)
