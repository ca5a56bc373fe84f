"""Describes the families of models that rlcs trains."""

from dataclasses import dataclass

from rlcs.errors import ModelError
from rlcs.model.chat import DEFAULT_SYSTEM


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What differs between families of models.

    The three parts are patterns on the names of their parameters. `default_system` is the system message that
    the chat template inserts when there is none; None: no system turn.
    """

    vision_tower: str
    merger: str
    language_model: str = r"^(model\.language_model\.|lm_head\.)"
    default_system: str | None


_QWEN_2 = Family(
    vision_tower=r"^model\.visual\.(?!merger\.)",
    merger=r"^model\.visual\.merger\.",
    default_system=DEFAULT_SYSTEM,
)
_QWEN_3 = Family(
    vision_tower=r"^model\.visual\.(?!merger\.|deepstack_merger_list\.)",
    merger=r"^model\.visual\.(merger|deepstack_merger_list)\.",
    default_system=None,
)
FAMILIES = {"qwen2_vl": _QWEN_2, "qwen2_5_vl": _QWEN_2, "qwen3_vl": _QWEN_3}
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
