"""A model's folder with a file that is missing, cut off or damaged is a sentence that names it."""

import shutil

import pytest
import torch

from rlcs.errors import ModelError
from rlcs.model import loading
from rlcs.recipe.schema import Model

CASES = [
    ("model.safetensors", "missing", "model.safetensors"),
    ("model.safetensors", "empty", "model.safetensors is cut off or damaged"),
    ("model.safetensors", "half", "model.safetensors is cut off or damaged"),
    ("model.safetensors", "flipped", "model.safetensors is cut off or damaged"),
    ("tokenizer.json", "missing", "has no tokenizer"),
    ("tokenizer.json", "empty", "cannot load the model"),
    ("tokenizer.json", "half", "cannot load the model"),
    ("tokenizer.json", "flipped", "cannot load the model"),
    ("config.json", "missing", "neither a run nor a model"),
    ("config.json", "half", "config.json"),
    ("processor_config.json", "half", "processor_config.json"),
    ("chat_template.jinja", "half", "chat template cannot be read"),
]


@pytest.mark.fault("storage", "a file of a model missing, cut off or damaged", "a sentence with the file")
@pytest.mark.parametrize(("name", "how", "message"), CASES, ids=lambda case: str(case).replace(" ", "_"))
def test_a_damaged_file_of_a_model_is_a_sentence(random_model_folder, tmp_path, name, how, message):
    folder = tmp_path / "model"
    shutil.copytree(random_model_folder, folder)
    path = folder / name
    content = path.read_bytes()
    flipped = content[:10] + bytes([content[10] ^ 1]) + content[11:]
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "flipped": flipped}[how])
    with pytest.raises(ModelError, match=message):
        loading.make_chat(loading.load(Model(name=str(folder)), device=torch.device("cpu")))
