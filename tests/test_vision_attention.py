"""The vision tower calls its attention once a layer, and computes what transformers' own computes."""

import copy
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedModel, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import family_models
from rlcs.model import attention, loading, vision_attention
from rlcs.model.vision_attention import attend_by_windows
from rlcs.recipe.schema import Model

GRIDS = [(1, 24, 36), (1, 8, 8), (1, 24, 36), (2, 10, 14), (1, 4, 30)]
"""Images of 56 to 504 pixels a side, one of two frames: windows of 64 patches, and of what is left over."""


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request, random_model_folder, tmp_path_factory) -> PreTrainedModel:
    folder = random_model_folder
    if request.param != "qwen2_5_vl":
        folder = family_models.build(request.param, tmp_path_factory.mktemp(request.param))
    model = loading.load(Model(name=str(folder)), device=torch.device("cpu")).model
    assert model.config.model_type == request.param
    if request.param == "qwen2_5_vl":
        model.model.visual.fullatt_block_indexes = [1]  # the first layer attends in windows
    return model


class Calls:
    """An attention that counts how often it is called."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *inputs, **kwargs):
        self.count += 1
        return self.function(*inputs, **kwargs)


def tower(model: PreTrainedModel, name: str) -> tuple[list[torch.Tensor], int]:
    """Outputs of the tower and gradients of its weights and patches, and the number of calls of attention."""
    model.set_attn_implementation({"vision_config": name})
    interface = AttentionInterface()
    stock = interface[name]
    AttentionInterface.register(name, counted := Calls(stock))
    try:
        visual = model.model.visual
        grids = torch.tensor(GRIDS)
        generator = torch.Generator().manual_seed(0)
        width = visual.config.in_channels * visual.config.temporal_patch_size * visual.config.patch_size**2
        patches = torch.randn(int(grids.prod(1).sum()), width, generator=generator).requires_grad_()
        output = visual(patches, grid_thw=grids)
        states = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in states)
        weights = [p for p in visual.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [patches, *weights])
        return [*(x.detach() for x in states), *grads], counted.count
    finally:
        AttentionInterface.register(name, stock)
        model.set_attn_implementation({"vision_config": vision_attention.NAME})


def test_outputs_and_gradients_are_those_of_transformers_with_a_call_a_layer(model):
    stock, calls_before = tower(model, "sdpa")
    ours, calls = tower(model, vision_attention.NAME)
    layers = len(model.model.visual.blocks)
    images = sum(frames for frames, _, _ in GRIDS)
    windows = 2 * (3 * 5) + 1 + 2 * (2 * 2) + 1 * 4 if model.config.model_type == "qwen2_5_vl" else images
    assert calls == layers
    assert calls_before == windows + images * (layers - 1)
    for mine, theirs in zip(ours, stock, strict=True):
        largest = theirs.abs().max()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=float(1e-6 * largest))


def test_a_run_uses_it_and_the_saved_model_does_not_name_it(model, tmp_path):
    assert model.model.visual.config._attn_implementation == vision_attention.NAME
    assert model.model.language_model.config._attn_implementation == attention.NAME
    model.config.save_pretrained(tmp_path)
    assert "rlcs" not in (tmp_path / "config.json").read_text()


def test_one_large_image_of_the_real_tower_takes_32_calls_instead_of_2804():
    """39 x 39 tokens (1,521) in windows of 4 x 4: 100 windows in 28 layers, and the image in 4."""
    config = Qwen2_5_VLConfig().vision_config
    assert (config.depth, len(config.fullatt_block_indexes), config.window_size) == (32, 4, 112)
    config.update({"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16})
    counts = []
    for name in ("sdpa", vision_attention.NAME):
        visual = Qwen2_5_VisionTransformerPretrainedModel(copy.deepcopy(config))
        visual.config._attn_implementation = name
        stock = AttentionInterface()[name]
        AttentionInterface.register(name, counted := Calls(stock))
        with torch.no_grad():
            visual(torch.zeros(4 * 1521, 1176), grid_thw=torch.tensor([[1, 78, 78]]))
        AttentionInterface.register(name, stock)
        counts.append(counted.count)
    assert counts == [2804, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_on_a_cpu_is_that_of_a_call_for_each_window(dtype):
    ends = [0, 64, 128, 160, 224, 240, 256]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 256, 24, generator=generator).to(dtype) for _ in range(3))
    ours, _ = attend_by_windows(None, query, key, value, None, cu_seq_lens_q=torch.tensor(ends), scaling=0.3)
    for start, end in pairwise(ends):
        window = [x[:, :, start:end] for x in (query, key, value)]
        alone = torch.nn.functional.scaled_dot_product_attention(*window, scale=0.3)
        assert torch.equal(ours[:, start:end], alone.transpose(1, 2))


def by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale):
    """What torch's `varlen_attn` is documented to compute: (L, H, D)."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k == 64
    assert all(x.is_contiguous() for x in (query, key, value))
    parts = []
    for start, end in pairwise(cu_seq_q.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end]))
    return torch.cat(parts)


def test_gpus_get_all_windows_in_one_call(monkeypatch):
    ends = torch.tensor([0, 64, 96, 100], dtype=torch.int32)
    query, key, value = (torch.randn(1, 100, 4, 24).transpose(1, 2) for _ in range(3))
    given = {"cu_seq_lens_q": ends, "max_length_q": 64, "scaling": 0.3, "is_causal": False, "dropout": 0.0}
    plain, _ = attend_by_windows(None, query, key, value, None, **given)
    monkeypatch.setattr(vision_attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(vision_attention, "varlen_attn", by_hand)
    ours, _ = attend_by_windows(None, query, key, value, None, **given)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_torch_takes_that_call_and_gives_gradients(monkeypatch):
    """By torch's own rules for shapes, on tensors without data."""
    monkeypatch.setattr(vision_attention, "_has_kernel", lambda query: True)
    with FakeTensorMode():
        inputs = [
            torch.empty(1, 100, 16, 80, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for _ in range(3)
        ]
        ends = torch.tensor([0, 64, 100], dtype=torch.int32)
        output, _ = attend_by_windows(None, *inputs, None, cu_seq_lens_q=ends, max_length_q=64, scaling=0.1)
        assert output.shape == (1, 100, 16, 80) and output.dtype == torch.bfloat16
        grads = torch.autograd.grad(output.sum(), inputs)
        assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_the_kernel_is_for_bfloat16_on_newer_gpus(monkeypatch):
    with FakeTensorMode():
        query = torch.empty(1, 16, 100, 80, dtype=torch.bfloat16, device="cuda")
        odd = torch.empty(1, 16, 100, 12, dtype=torch.bfloat16, device="cuda")
        found = []
        for version in ((9, 0), (8, 0), (7, 5)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, v=version: v)
            found.append([vision_attention._has_kernel(x) for x in (query, query.float(), odd)])
    assert found == [[True, False, False], [True, False, False], [False, False, False]]
    assert not vision_attention._has_kernel(torch.empty(1, 16, 100, 80, dtype=torch.bfloat16))


@pytest.mark.parametrize("wrong", [{}, {"dropout": 0.1}, {"is_causal": True}])
def test_what_it_cannot_compute_is_refused(wrong):
    x = torch.zeros(1, 2, 8, 4)
    given = {"cu_seq_lens_q": torch.tensor([0, 8]), **wrong} if wrong else {}
    with pytest.raises(ValueError, match="for vision towers"):
        attend_by_windows(None, x, x, x, None, **given)
