"""The problems that the chat page offers: of the model's own run, of the built-in model, or none."""

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import draw, make_problem
from rlcs.data.images import encoded_image
from rlcs.data.problem_store import ProblemStore
from rlcs.records import Turn
from rlcs.serving.example_problems import MOST, example_problems, run_of

LOST = draw(28, 112)
TWO = ((28, 28), (56, 28))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder after its measurement: problems with images and without, with turns, with a lost image."""
    folder = tmp_path / "run"
    (folder / "sft_grpo" / "final").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    plain = make_problem("text", "3 + 5?", ())
    turns = make_problem("turns", "And now?", ((28, 28),))
    turns = replace(turns, history=(Turn(role="user", text="One?"), Turn(role="assistant", text="One.")))
    lost = replace(make_problem("lost", "Lost?", ()), images=(LOST,))
    two = replace(make_problem("two", "<image>Compare with <image>.", TWO), choices=("alike", "not"))
    more = [make_problem(f"p{number}", f"Question {number}?", ((28, 84),)) for number in range(MOST + 2)]
    ProblemStore(folder / "eval").add([plain, turns, lost, two, *more])
    for image in (folder / "eval" / "images").glob(f"{LOST.sha256[:24]}*"):
        image.unlink()
    return folder


@pytest.mark.parametrize("where", ["", "sft_grpo/final", "sft_grpo"])
def test_a_model_of_a_run_has_held_out_problems_of_it(run, tmp_path, where):
    found = example_problems(["hub/id", str(run / where)], tmp_path)
    (question, files), *others = found
    assert len(found) == MOST and [text for text, _ in others] == [f"Question {n}?" for n in range(MOST - 1)]
    assert "<image>" not in question and question.startswith("Compare with") and "(B) not" in question
    images = make_problem("two", "?", TWO).images
    assert [Path(file).read_bytes() for file in files] == [encoded_image(image) for image in images]
    assert all(Path(file).suffix == ".png" for _, files in found for file in files)


def test_the_builtin_models_have_puzzles_and_others_have_none(tmp_path, monkeypatch, run):
    for names in (["builtin"], ["x", "builtin"], ["builtin-hybrid"]):
        assert len(example_problems(names, tmp_path)) == 6
    monkeypatch.chdir(run)  # a hub id is no folder here, whatever lies around
    assert example_problems(["Qwen/Qwen2.5-VL-3B-Instruct", "m"], tmp_path) == []
    elsewhere = tmp_path / "exported"
    elsewhere.mkdir()
    assert run_of(str(elsewhere)) is None and example_problems([str(elsewhere)], tmp_path) == []


def test_a_run_without_a_measurement_or_with_a_torn_one_is_no_obstacle(run, tmp_path):
    path = run / "eval" / "problems.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len(example_problems([str(run)], tmp_path)) == MOST
    path.write_text('{"id": "x"}\n{"torn')
    assert example_problems([str(run)], tmp_path) == []
    path.unlink()
    assert example_problems([str(run)], tmp_path) == []
