"""The families of models that rlcs trains, each in a file of its own."""

from rlcs.errors import ModelError
from rlcs.model.families.family import Family
from rlcs.model.families.gemma4 import Gemma4
from rlcs.model.families.internvl import InternVl
from rlcs.model.families.qwen2_vl import Qwen2Vl, Qwen25Vl
from rlcs.model.families.qwen3_5 import Qwen35
from rlcs.model.families.qwen3_5_moe import Qwen35Moe
from rlcs.model.families.qwen3_vl import Qwen3Vl
from rlcs.model.families.qwen3_vl_moe import Qwen3VlMoe

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Qwen2Vl(),
        Qwen25Vl(),
        Qwen3Vl(),
        Qwen3VlMoe(),
        Qwen35(),
        Qwen35Moe(),
        InternVl(),
        Gemma4(),
    )
}
"""Families by the `model_type` of a model's configuration."""


def family_of(model_type: str, name: str) -> Family:
    """The family of the model called `name`. Raises ModelError for a type that is not supported."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} are not supported",
            where=f"model.name={name}",
            fix=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]
