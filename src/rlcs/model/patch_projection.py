"""The first layer of a vision tower with flat patches, as the matrix product that it is.

transformers calls a convolution with one patch a row, whose kernel covers all of it. The product is the same;
torch's convolutions take several times as long for it on a CPU, above all for the gradient of the weights.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel


class PatchProjection(nn.Conv3d):
    """A convolution over whole patches; never made, but set as the class of one."""

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (N, C, frames, P, P) to (N, channels, 1, 1, 1)."""
        if patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        output = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return output[:, :, None, None, None]


def install(model: PreTrainedModel) -> None:
    """Make all convolutions of a model that do not overlap compute single patches as a product."""
    for module in model.modules():
        if type(module) is nn.Conv3d and module.stride == module.kernel_size and not any(module.padding):
            module.__class__ = PatchProjection
