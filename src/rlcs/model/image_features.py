"""The vision inputs of a pack: patches, or what a frozen vision tower made of them before.

A tower that does not train gives the same output in every pass of a step: reference, old logprobs, update. A
pack with `kept` holds what the mergers got from it, so that the tower runs once; the mergers, which may
train, run in every pass. Whether packs keep it is decided for all ranks together (`train.batching`), so that
a sharded tower runs on all ranks or on none.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlcs.model.packing import Pack
from rlcs.model.vlm import Vlm

Kept = tuple[type, list[int] | None, Tensor, list[Tensor]]
"""The type of the model's vision output, tokens of each image (None: it has those of all images together),
their order, and the mergers' inputs."""


def image_inputs(vlm: Vlm, pack: Pack) -> dict[str, Any]:
    """The vision inputs of the model's forward: every image once. Raises ImageError."""
    if not pack.images or pack.grids is None:
        return {}
    if pack.kept is None or vlm.frozen_tower is None or not vlm.family.mergers(vlm.model):
        return _vision_inputs(vlm, pack)
    key = (vlm.frozen_tower, vlm.model.dtype)
    if key not in pack.kept:
        pack.kept[key] = _tower_output(vlm, pack)
    return {"mm_encoder_outputs": {"image": _merged(vlm, pack.kept[key])}}


def affordable_patches(vlm: Vlm, limit_bytes: int) -> int:
    """Patches for which the output of a frozen tower takes at most so many bytes; 0 if it trains."""
    mergers = vlm.family.mergers(vlm.model)
    if vlm.frozen_tower is None or not mergers:
        return 0
    values = vlm.family.tower_width(vlm.model) * len(mergers)
    return int(limit_bytes // (values * vlm.model.dtype.itemsize))


def kept_patches(packs: Iterable[Pack]) -> int:
    """Patches of the packs that keep what a frozen tower makes of them."""
    return sum(int(p.grids.prod(dim=1).sum()) for p in packs if p.kept is not None and p.grids is not None)


def _vision_inputs(vlm: Vlm, pack: Pack) -> dict[str, Any]:
    assert pack.grids is not None
    patches = [pack.pixels(ref, vlm.device).to(vlm.model.dtype) for ref in pack.images]
    return vlm.family.vision_inputs(patches, pack.grids)


@torch.no_grad()
def _tower_output(vlm: Vlm, pack: Pack) -> Kept:
    """What is kept of a pass through the tower.

    The order is found by letting the merger return the numbers of its rows: a tower with windows sorts them.
    """
    inputs: dict[nn.Module, Tensor] = {}

    def numbered(
        module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        [inputs[module]] = (*arguments, *named.values())
        return torch.arange(len(output), device=output.device)[:, None]

    mergers = vlm.family.mergers(vlm.model)
    hooks = [merger.register_forward_hook(numbered, with_kwargs=True) for merger in mergers]
    try:
        model: Any = vlm.model.base_model
        output = model.get_image_features(**_vision_inputs(vlm, pack), return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    together = isinstance(output.pooler_output, Tensor)
    parts = [output.pooler_output] if together else output.pooler_output
    sizes = None if together else [len(part) for part in parts]
    order = torch.cat(parts)[:, 0]
    return type(output), sizes, order, [inputs[merger] for merger in mergers]


def _merged(vlm: Vlm, kept: Kept) -> Any:
    kind, sizes, order, inputs = kept
    first, *deeper = (merger(x) for merger, x in zip(vlm.family.mergers(vlm.model), inputs, strict=True))
    if sizes is None:
        return kind(pooler_output=first[order])
    more = {"deepstack_features": [features.split(sizes) for features in deeper]} if deeper else {}
    return kind(pooler_output=first[order].split(sizes), **more)
