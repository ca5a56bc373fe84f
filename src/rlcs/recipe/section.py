"""What every section of a recipe is built from: the strict base and the types of single values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

Part = Literal["vision_tower", "merger", "language_model"]


class Section(BaseModel):
    """A part of the recipe: strict keys, frozen once resolved."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
