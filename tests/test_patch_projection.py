"""The first layer of a vision tower computes what torch's convolution computes, gradients included."""

import pytest
import torch
from torch import nn

import family_models
from rlcs.model import loading, patch_projection
from rlcs.model.patch_projection import PatchProjection
from rlcs.recipe.schema import Model


def computed(layer: nn.Module, patches: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and the weights."""
    patches = patches.clone().requires_grad_()
    output = layer(patches)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [patches, *layer.parameters()], upstream)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 40])
def test_it_equals_the_convolution(bias, count):
    torch.manual_seed(0)
    layer = nn.Conv3d(3, 24, (2, 14, 14), stride=(2, 14, 14), bias=bias).double()
    patches = torch.randn(count, 3, 2, 14, 14, dtype=torch.float64)
    exact = computed(layer, patches)
    patch_projection.install(nn.Sequential(layer))
    assert type(layer) is PatchProjection
    torch.testing.assert_close(computed(layer, patches), exact, rtol=1e-12, atol=1e-12)


def test_a_whole_video_is_still_convolved():
    layer = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4))
    video = torch.randn(2, 3, 4, 12, 8)
    exact = layer(video)
    patch_projection.install(nn.Sequential(layer))
    assert torch.equal(layer(video), exact)


def test_convolutions_that_overlap_are_left_alone():
    layer = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 2, 2))
    patch_projection.install(nn.Sequential(layer))
    assert type(layer) is nn.Conv3d


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_families_with_flat_patches_have_it(family, random_model_folder, tmp_path):
    folder = random_model_folder if family == "qwen2_5_vl" else family_models.build(family, tmp_path)
    model = loading.load(Model(name=str(folder)), device=torch.device("cpu")).model
    assert [type(m) for m in model.modules() if isinstance(m, nn.Conv3d)] == [PatchProjection]
