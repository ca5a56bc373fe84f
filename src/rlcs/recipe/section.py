"""The base class of a recipe's sections, and the types of their values."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Every number is bounded: what no run can use is a sentence before it starts, not an error in its middle.
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Whole = Annotated[int, Field(ge=0, le=1_000_000_000)]
NonNegative = Annotated[float, Field(ge=0, le=1_000_000)]
Above0 = Annotated[float, Field(ge=1e-6, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0.001, le=100_000_000)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Nucleus = Annotated[float, Field(ge=1e-6, le=1)]
"""The share of probability from which tokens are sampled (top-p)."""
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""The weight of a reward's part: bounded, so that the sum stays finite."""
Share = Annotated[float, Field(ge=0, le=1)]

COLDEST = 0.001
"""The least temperature but 0: logits divided by it are still finite in every number format."""


def _not_tiny(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"should be 0 or at least {COLDEST}")
    return value


Warm = Annotated[float, Field(ge=COLDEST, le=1_000)]
"""A temperature at which answers are drawn at random."""
Temperature = Annotated[float, Field(ge=0, le=1_000), AfterValidator(_not_tiny)]
"""A temperature; at 0 the likeliest token is taken."""


def _folder_name(name: str) -> str:
    """The name, which a folder of runs/ gets. Raises ValueError for one that leads elsewhere."""
    if not re.fullmatch(r"[^/\\]{1,100}", name) or not name.isprintable() or not name.strip(". "):
        raise ValueError("should be a name of at most 100 characters without / and \\, as a folder gets it")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
"""A name that a folder gets."""
Seed = Annotated[int, Field(ge=-(2**31), le=2**32 - 1)]
Part = Literal["vision_tower", "merger", "language_model"]
FrozenPart = Part | Literal["experts", "router"]
"""What a stage may freeze: a part, or of a language model that is a mixture, its experts or their router."""


class Section(BaseModel):
    """A section of the recipe: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
