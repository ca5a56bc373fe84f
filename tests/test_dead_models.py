"""Weights that are damaged or spoilt by training: a sentence and no exit code 0, whatever the command."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import warm
from rlcs.engines.decoding import DecodingBatch
from rlcs.errors import ModelError, TrainingError
from rlcs.model import loading
from rlcs.model.loading import resolve
from rlcs.model.vlm import require_alive
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Optimizer
from rlcs.train.trainer import Trainer


def damaged(folder, change):
    """The built-in model with other weights."""
    shutil.copytree(Path(resolve("builtin")), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: change(name, tensor) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


DAMAGE = {
    "NaN": (lambda name, tensor: torch.full_like(tensor, float("nan")), "are not all finite"),
    "infinity": (lambda name, tensor: tensor / 0.0, "are not all finite"),
    "one NaN": (lambda name, tensor: spoilt(tensor) if "layers.0" in name else tensor, "are not all finite"),
    "zeros": (lambda name, tensor: torch.zeros_like(tensor), "all weights are zero"),
}


def spoilt(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


@pytest.mark.fault("numbers", "weights of NaN, infinity or zero", "a sentence and exit code 2")
@pytest.mark.parametrize("kind", DAMAGE)
def test_dead_weights_are_refused_when_they_are_loaded(kind, tmp_path):
    change, said = DAMAGE[kind]
    folder = damaged(tmp_path / "model", change)
    with pytest.raises(ModelError, match=said):
        loading.load(Model(name=str(folder)))


@pytest.mark.fault("numbers", "generate with weights of NaN", "a sentence and exit code 2")
def test_generate_with_dead_weights_fails(tmp_path):
    folder = damaged(tmp_path / "model", DAMAGE["NaN"][0])
    words = ["generate", str(folder), "What is 2 + 2?"]
    done = warm.run([sys.executable, "-m", "rlcs", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "not all finite" in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )


def test_whole_weights_pass():
    vlm = loading.load(Model(name="builtin"))
    require_alive(vlm.model, "builtin")


@pytest.mark.fault("numbers", "a model whose logits become NaN while it answers", "a sentence, no answers")
def test_logits_that_are_no_numbers_are_no_answers():
    from conftest import make_problem  # noqa: F401 - the helpers of the suite

    batch = DecodingBatch.__new__(DecodingBatch)
    for row in (torch.full((1, 8), float("nan")), torch.full((1, 8), float("-inf"))):
        batch._logits = row
        with pytest.raises(ModelError, match="NaN instead of probabilities"):
            batch._require_numbers(0)
    batch._logits = torch.tensor([[0.0, float("-inf")]])
    batch._require_numbers(0)


@pytest.mark.fault("numbers", "three of four steps without a finite gradient", "the stage fails")
@pytest.mark.parametrize(
    ("lost", "steps", "fails"), [(3, 4, True), (1, 4, False), (26, 100, True), (25, 100, False)]
)
def test_a_stage_that_loses_more_than_a_quarter_of_its_steps_fails(lost, steps, fails):
    trainer = Trainer(loading.load(Model(name="builtin")), Optimizer(), steps=steps, max_bad_steps=5)
    trainer.lost_steps = lost
    if not fails:
        trainer.require_finite(steps)
        return
    with pytest.raises(
        TrainingError, match=rf"not finite in {lost} of {steps} steps(?s:.*)lower the learning rate"
    ):
        trainer.require_finite(steps)
