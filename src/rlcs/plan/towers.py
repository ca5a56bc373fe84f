"""Sizes of vision towers of any family, from their configurations."""

from dataclasses import dataclass
from math import ceil
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """The sizes of a vision tower of any family.

    `pixels` are the numbers in a patch; `merge`^2 patches become a token, `side` pixels wide. `windowed`
    blocks attend within `window` patches, others to the whole image. The `norms` of a block are layer norms,
    or RMS norms that compute in fp32 (`rms`) and multiply by their weights there (`exact`); `attention_norms`
    are those of queries, keys and values. For its backward pass attention keeps `attention_keeps` tensors of
    hidden width, and an MLP (of three matrices if `gated`) `mlp_keeps` of its own. `merging` are the weights
    that compute a token from its patches, `features` the numbers of a token that the tower itself returns,
    for one of the `mergers` or several. `tile` is the number of tokens of a tile, where images are cut into
    such (else 0); `budgets` are the numbers of tokens that an image can have at most, where it is enlarged to
    one of them.
    """

    depth: int
    hidden: int
    intermediate: int
    heads: int
    pixels: int
    merge: int
    side: int
    windowed: int
    window: int
    norms: int
    rms: bool
    exact: bool
    attention_norms: int
    attention_keeps: int
    mlp_keeps: int
    gated: bool
    mergers: int
    merging: int
    features: int
    tile: int = 0
    budgets: tuple[int, ...] = ()

    def tokens(self, pixels: int) -> int:
        """The tokens of the largest image there is where images have at most so many pixels."""
        tokens = pixels // self.side**2
        if self.budgets:
            return max((budget for budget in self.budgets if budget <= tokens), default=self.budgets[0])
        if not self.tile:
            return tokens
        tiles = tokens // self.tile
        return (tiles if tiles > 2 else 1) * self.tile  # two of an image and its small copy are three

    def whole(self, tokens: int) -> int:
        """As many tokens of an image, or the next number that there can be."""
        if self.budgets:  # all images are enlarged
            return self.budgets[-1]
        return self.tile * ceil(tokens / self.tile) if self.tile else tokens


def tower_of(config: Any) -> Tower:
    """The tower of a configuration of any family."""
    towers = {"gemma4": _gemma, "internvl": _internvl}
    return towers.get(config.model_type, _qwen)(config)


def _qwen(config: Any) -> Tower:
    """Of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5."""
    vision = config.vision_config
    full = getattr(vision, "fullatt_block_indexes", None)  # Qwen2.5-VL alone has windows
    hidden = getattr(vision, "embed_dim", vision.hidden_size)  # in Qwen2-VL hidden_size is the output's
    merged = hidden * vision.spatial_merge_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    output = getattr(vision, "out_hidden_size", vision.hidden_size)
    ungated = 3 if vision.hidden_act == "quick_gelu" else 2
    return Tower(
        depth=vision.depth,
        hidden=hidden,
        intermediate=getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio),
        heads=vision.num_heads,
        pixels=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size,
        side=vision.patch_size * vision.spatial_merge_size,
        windowed=0 if full is None else vision.depth - len(full),
        window=0 if full is None else (vision.window_size // vision.patch_size) ** 2,
        norms=2,
        rms=full is not None,
        exact=False,
        attention_norms=0,
        attention_keeps=5,
        mlp_keeps=ungated if full is None else 4,
        gated=full is not None,
        mergers=mergers,
        merging=mergers * (merged * merged + merged * output),
        features=mergers * merged,
    )


def _gemma(config: Any) -> Tower:
    """Of Gemma 4: nine patches are averaged to a token, which one matrix maps into the language model."""
    vision, output = config.vision_config, config.get_text_config().hidden_size
    return Tower(
        depth=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        heads=vision.num_attention_heads,
        pixels=3 * vision.patch_size**2,
        merge=vision.pooling_kernel_size,
        side=vision.patch_size * vision.pooling_kernel_size,
        windowed=0,
        window=0,
        norms=4,
        rms=True,
        exact=True,
        attention_norms=3,
        attention_keeps=12 if vision.use_clipped_linears else 4,
        mlp_keeps=7 if vision.use_clipped_linears else 4,
        gated=True,
        mergers=1,
        merging=vision.hidden_size * output,
        features=vision.hidden_size,
        budgets=(70, 140, 280, 560, 1120),
    )


def _internvl(config: Any) -> Tower:
    """Of InternVL: tiles are seen one by one, four patches of one make a token."""
    vision, output = config.vision_config, config.get_text_config().hidden_size
    (image, _), (patch, _) = vision.image_size, vision.patch_size
    merge = int(1 / config.downsample_ratio)
    merged = vision.hidden_size * merge**2
    return Tower(
        depth=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        heads=vision.num_attention_heads,
        pixels=vision.num_channels * patch**2,
        merge=merge,
        side=patch * merge,
        windowed=vision.num_hidden_layers,
        window=(image // patch) ** 2,
        norms=2,
        rms=vision.norm_type == "rms_norm",
        exact=False,
        attention_norms=2 if vision.use_qk_norm else 0,
        attention_keeps=6,
        mlp_keeps=2,
        gated=False,
        mergers=1,
        merging=merged * output + output * output,
        features=merged,
        tile=(image // (patch * merge)) ** 2,
    )
