"""What a run was made from is compared when it goes on: rows, gold answers, images, and the model's files."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from conftest import make_problem
from rlcs.data.rows import Row
from rlcs.data.run_data import RunData
from rlcs.errors import RunFolderError
from rlcs.pipeline import inputs
from rlcs.pipeline.inputs import INPUTS, check_inputs
from rlcs.storage import append_jsonl, read_json


def data_of(**changed):
    problems = tuple(make_problem(f"p{number}") for number in range(4))
    rows = (Row(problem=problems[0], response="It is 4."),)
    return RunData(**{"cold_start": rows, "rl": problems[1:3], "test": problems[3:], **changed})


def other(problem, **changed):
    return replace(problem, **changed)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(f'{{"model_type": "{name}"}}')
    (folder / "README.md").write_text("notes")
    return folder


@pytest.fixture
def run(tmp_path, model):
    """A run with results, whose inputs are written down."""
    folder = tmp_path / "run"
    check_inputs(folder, data_of(), str(model))
    append_jsonl(folder / "eval" / "base" / "predictions.jsonl", [{"id": "1"}])
    return folder


def test_the_same_inputs_pass_and_only_once_are_written(run, model):
    before = (run / INPUTS).stat().st_mtime_ns
    check_inputs(run, data_of(), str(model))
    (model / "README.md").write_text("other notes")
    check_inputs(run, data_of(rl=()), str(model))  # `rlcs sft` reads no problems of RL
    assert (run / INPUTS).stat().st_mtime_ns == before


RL = data_of().rl
CHANGES = {
    "gold answer": ({"rl": (RL[0], other(RL[1], answer="5"))}, r"data\.rl: 1 rows .*first 'p2'"),
    "image": ({"rl": (other(RL[0], images=make_problem("x").images), RL[1])}, r"data\.rl: 1 .*'p1'"),
    "notes": ({"rl": (other(RL[0], metadata={"pass_rate": 0.5}), RL[1])}, r"data\.rl: 1 rows .*'p1'"),
    "order": ({"rl": RL[::-1]}, r"data\.rl: 2 rows"),
    "rows": ({"test": RL}, r"data\.test has 2 rows instead of 1"),
    "response": (
        {"cold_start": (Row(problem=make_problem("p0"), response="It is 5."),)},
        r"data\.cold_start: 1 rows .*'p0'",
    ),
}


@pytest.mark.fault("data", "data, gold answers or images edited between stop and resume", "refused by name")
@pytest.mark.parametrize("name", CHANGES)
def test_edited_data_is_refused_with_what_changed(run, model, name):
    changed, message = CHANGES[name]
    for dry in (True, False):
        with pytest.raises(RunFolderError, match=message):
            check_inputs(run, data_of(**changed), str(model), dry=dry)
    check_inputs(run, data_of(), str(model))


@pytest.mark.fault("storage", "the model folder replaced between stop and resume", "refused with the file")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_model_in_its_folder_is_refused(run, model, name):
    path = model / name
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + b" ")
    with pytest.raises(RunFolderError, match=rf"{model}: {name}"):
        check_inputs(run, data_of(), str(model))
    path.write_bytes(content)  # as it was, written again
    check_inputs(run, data_of(), str(model))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if name != "config.json":
        path.unlink()
        with pytest.raises(RunFolderError, match=rf"{model}: {name}"):
            check_inputs(run, data_of(), str(model))


def test_a_start_without_results_may_have_other_inputs(tmp_path, model):
    folder = tmp_path / "new"
    check_inputs(folder, data_of(), str(model))
    before = read_json(folder / INPUTS)
    check_inputs(folder, data_of(rl=RL[::-1]), str(model), dry=True)
    assert read_json(folder / INPUTS) == before
    check_inputs(folder, data_of(rl=RL[::-1]), str(model))
    assert read_json(folder / INPUTS) != before


def test_a_run_goes_on_with_the_commit_of_its_first_start(tmp_path, monkeypatch):
    """Whatever has come to the hub meanwhile; without results it takes what is there."""
    commits = {"main": "a" * 40}

    def load_config(name, revision=None):
        return SimpleNamespace(_commit_hash=commits[revision or "main"])

    monkeypatch.setattr(inputs, "load_config", load_config)
    folder = tmp_path / "run"
    assert check_inputs(folder, data_of(), "some/model") == "a" * 40
    commits["main"] = "b" * 40
    assert check_inputs(folder, data_of(), "some/model") == "a" * 40
    assert read_json(folder / INPUTS)["model"] == {"some/model@main": {"sha256": "a" * 40}}
    assert check_inputs(tmp_path / "other", data_of(), "some/model") == "b" * 40
    commits["v1"] = "c" * 40
    assert check_inputs(folder, data_of(), "some/model", revision="v1") == "c" * 40


def test_the_files_of_a_folder_have_no_commit(run, model):
    assert check_inputs(run, data_of(), str(model), revision="given") == "given"
