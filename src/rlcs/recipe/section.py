"""The base class of a recipe's sections, and the types of their values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""The weight of a reward's part: bounded, so that the sum stays finite."""
Share = Annotated[float, Field(ge=0, le=1)]

Part = Literal["vision_tower", "merger", "language_model"]
FrozenPart = Part | Literal["experts", "router"]
"""What a stage may freeze: a part, or of a language model that is a mixture, its experts or their router."""


class Section(BaseModel):
    """A section of the recipe: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
