"""Finds the sizes of a recipe's model: of known models in a table, of others from their modules."""

from pathlib import Path

from rlcs.plan.shapes import Sizes
from rlcs.recipe.schema import Model
from rlcs.storage import read_json

SIZES_FILE = Path(__file__).with_name("sizes.json")
"""Sizes of known models by name, as `Sizes.to_json` writes them: reading them needs no torch.

`python -m tools.plan_sizes` writes the file; a test compares it with the models' modules.
"""


def sizes_of(settings: Model) -> Sizes:
    """The sizes of a recipe's model: published name, folder, hub id or `builtin`. Raises ModelError."""
    if plain := read_json(SIZES_FILE).get(settings.name):
        return Sizes.from_json(settings.name, plain)
    from rlcs.plan.skeleton import sizes_from_configuration  # seconds of imports

    return sizes_from_configuration(settings)
