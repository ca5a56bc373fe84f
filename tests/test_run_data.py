"""The data of a run: what is read, and what happens to training rows that are also in the test data."""

import json

import pytest
from PIL import Image

from rlcs.data.run_data import compare_with_test, load_run_data
from rlcs.errors import DataError
from rlcs.recipe.loading import load_recipe

SHARED = 3


@pytest.fixture
def sources(tmp_path):
    """Sources of 20 charts each; 3 of `rl` are test problems in another format, and 2 show a test image."""

    def chart(number, kind="png", question="How many bars?"):
        path = tmp_path / f"img/{number}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            Image.new("RGB", (40, 30), (number, 2 * number % 256, 7)).save(path)
        return {"question": question, "answer": str(number), "images": [f"img/{path.name}"]}

    rows = {
        "cold_start": [{**chart(i), "response": rf"\boxed{{{i}}}"} for i in range(20)],
        "rl": [
            *(chart(i, "bmp") for i in range(40, 40 + SHARED)),
            *(chart(i, "bmp", "Which colour?") for i in (50, 51)),
            *(chart(i) for i in range(20, 35)),
        ],
        "test": [chart(i) for i in range(40, 60)],
    }
    for role, each in rows.items():
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return [f"data.{role}={tmp_path / role}.jsonl" for role in rows]


def loaded(words):
    recipe = load_recipe("quickstart", words).recipe
    return load_run_data(recipe.study, recipe.data, decode_limit=10**7)


def test_overlap_is_a_warning_with_the_first_pairs(sources):
    data = loaded(sources)
    assert (len(data.cold_start), len(data.rl), len(data.test)) == (20, 20, 20)
    shared, image = data.notes
    assert shared.startswith(
        "3 of 20 rows of rl are also in test, with the same question and the same images"
    )
    assert "(first: 1 is 1 there; 2 is 2 there; 3 is 3 there)" in shared and "data.overlap=drop" in shared
    assert image.startswith("note: 2 of 20 rows of rl have an image of test, with another question")
    found = data.checks["overlap"]["found"]
    assert [(fact["role"], fact["kind"], fact["rows"]) for fact in found] == [
        ("rl", "same problem", SHARED), ("rl", "same image", 2),
    ]  # fmt: skip
    assert data.checks["sources"]["rl"]["usable"] == 20


def test_overlap_is_dropped_on_demand(sources):
    data = loaded([*sources, "data.overlap=drop"])
    assert [problem.id for problem in data.rl] == [str(i) for i in range(SHARED + 1, 21)]
    assert len(data.cold_start) == 20 and "left out of the training" in data.notes[0]
    only = [word if ".rl=" not in word else word.replace("rl.jsonl", "test.jsonl") for word in sources]
    with pytest.raises(DataError, match=r"all 20 rows are also in data\.test"):
        loaded([*only, "data.overlap=drop"])


def test_overlap_is_refused_on_demand(sources):
    with pytest.raises(DataError, match=r"(?s)data.overlap=refuse: .*3 of 20 rows of rl.*data.overlap=drop"):
        loaded([*sources, "data.overlap=refuse"])
    apart = [word for word in sources if ".rl=" not in word]
    assert loaded([*apart, "data.overlap=refuse", "data.rl=builtin:puzzles?count=20"]).notes == ()


def test_what_was_not_compared_is_counted_and_a_drop_compares_all(sources, monkeypatch):
    monkeypatch.setattr("rlcs.data.run_data._MAX_PIXELS", 0)
    data = loaded(sources)
    assert "images were compared with those of test by their files" in data.notes[-1]
    assert data.checks["overlap"]["images_not_compared"] > 0 and not data.checks["overlap"]["found"]
    assert len(loaded([*sources, "data.overlap=drop"]).rl) == 17


def test_the_built_in_puzzles_do_not_overlap_and_are_compared_at_once(monkeypatch):
    monkeypatch.setattr("rlcs.data.overlap.open_image", lambda ref: pytest.fail("no image is decoded"))
    small = [f"data.{role}=builtin:puzzles?count=50&seed={i}" for i, role in enumerate(("cold_start", "rl"))]
    recipe = load_recipe("quickstart", [*small, "data.test=builtin:puzzles?count=50"]).recipe
    assert loaded([*small, "data.test=builtin:puzzles?count=50"]).notes == ()
    same = loaded([*small, "data.test=builtin:puzzles?split=train&count=30&seed=1"])
    assert "30 of 50 rows of rl are also in test" in "\n".join(same.notes)
    assert compare_with_test(same, recipe.data).checks["overlap"]["setting"] == "warn"
