"""What every part of the recipe is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: strict keys, frozen once resolved."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
