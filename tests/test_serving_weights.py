"""A model's weights for serving: names, values, bytes, and how much one process holds."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlcs.distributed import World
from rlcs.errors import RunFolderError
from rlcs.model import loading, serving_weights
from rlcs.model.serving_weights import serving_dtype, write_serving
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Lora
from rlcs.recipe.schema import Model
from rlcs.storage import read_json

BF16 = torch.bfloat16


def load(folder: Path, **settings: object) -> Vlm:
    return loading.load(Model(name=str(folder), **settings), device=torch.device("cpu"))


def adapted(folder: Path) -> Vlm:
    vlm = loading.prepare(load(folder), Lora(rank=4, alpha=8), (), seed=1)
    with torch.no_grad():
        for _, parameter in vlm.parameters():
            parameter += 0.02
    return vlm


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_half_the_bytes_in_bfloat16(random_model_folder: Path, tmp_path: Path) -> None:
    vlm = load(random_model_folder)
    loading.save(vlm, tmp_path / "saved")
    write_serving(vlm, tmp_path / "served", BF16)
    saved, served = tensors(tmp_path / "saved"), tensors(tmp_path / "served")
    assert {name: value.bfloat16() for name, value in saved.items()}.keys() == served.keys()
    assert all(torch.equal(served[name], value.bfloat16()) for name, value in saved.items())
    sizes = [sum(v.nbytes for v in found.values()) for found in (saved, served)]
    assert sizes[1] * 2 == sizes[0]
    written = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("saved", "served")]
    assert written[1] < 0.51 * written[0]
    config = read_json(tmp_path / "served" / "config.json")
    assert config["dtype"] == "bfloat16" and config["architectures"] == [type(vlm.model).__name__]
    again = load(tmp_path / "served", dtype="bfloat16")
    assert all(
        torch.equal(a, b.bfloat16())
        for a, b in zip(again.model.parameters(), vlm.model.parameters(), strict=True)
    )


def test_merged_adapters_are_rounded_once(random_model_folder: Path, tmp_path: Path) -> None:
    vlm = adapted(random_model_folder)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    loading.save(vlm, tmp_path / "saved")
    write_serving(vlm, tmp_path / "served", BF16)
    write_serving(replace(vlm, reference_mode=True), tmp_path / "base", torch.float32)
    served = tensors(tmp_path / "served")
    assert all(torch.equal(served[n], v.bfloat16()) for n, v in tensors(tmp_path / "saved").items())
    plain = load(random_model_folder).model.state_dict()
    base = load(tmp_path / "base").model.state_dict()
    assert all(torch.equal(base[name], value) for name, value in plain.items())
    assert all(torch.equal(before[name], value) for name, value in vlm.model.state_dict().items())


@pytest.mark.parametrize("make", [load, adapted])
def test_a_head_that_is_untied_lies_beside_the_embedding(random_model_folder, tmp_path, make) -> None:
    vlm = make(random_model_folder)
    write_serving(vlm, tmp_path, BF16, untied=True)
    found = tensors(tmp_path)
    (embedding,) = (value for name, value in found.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(found["lm_head.weight"], embedding)
    again = load(tmp_path)
    assert again.model.get_output_embeddings().weight is not again.model.get_input_embeddings().weight


def test_files_hold_a_part_each(random_model_folder, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_weights, "SHARD_BYTES", 50_000)
    vlm = load(random_model_folder)
    write_serving(vlm, tmp_path, torch.float32)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    largest = max(p.nbytes for p in vlm.model.parameters())
    assert max(path.stat().st_size for path in files) < 60_000 + largest
    index = read_json(tmp_path / "model.safetensors.index.json")["weight_map"]
    for path in files:
        with safe_open(path, "pt") as file:
            assert {name for name, at in index.items() if at == path.name} == set(file.keys())
    again = load(tmp_path).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in vlm.model.state_dict().items())


def test_a_full_disk_is_an_error_after_all_was_gathered(
    random_model_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks wait in the next gathering."""
    vlm, gathered = load(random_model_folder), []
    monkeypatch.setattr(serving_weights, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(serving_weights, "whole", lambda tensor: gathered.append(1) or tensor)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving_weights, "save_file", full)
    with pytest.raises(RunFolderError, match=r"cannot write the model.*No space left"):
        write_serving(vlm, tmp_path, BF16)
    assert len(gathered) == len(list(vlm.model.parameters()))


def test_the_dtype_is_the_computing_one_of_a_sharded_model(vlm: Vlm) -> None:
    sharded = replace(vlm, world=World(size=2, objects=SimpleNamespace()))
    assert serving_dtype(vlm, "bfloat16") == torch.float32 == serving_dtype(sharded, "same")
    assert serving_dtype(sharded, "bfloat16") == BF16
