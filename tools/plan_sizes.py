"""Writes the sizes of the models that `rlcs plan` knows: `python -m tools.plan_sizes`."""

import json
from typing import Any

from rlcs.model.source import BUILTIN
from rlcs.plan.sizes import SIZES_FILE
from rlcs.plan.skeleton import PUBLISHED, sizes_from_configuration
from rlcs.recipe.schema import Model
from rlcs.storage import read_json


def known_sizes() -> dict[str, dict[str, Any]]:
    """The sizes of all published models and the built-in ones, by name, from their modules."""
    names = [*BUILTIN, *read_json(PUBLISHED)]
    return {name: sizes_from_configuration(Model(name=name)).to_json() for name in names}


if __name__ == "__main__":
    rows = (f"{json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in known_sizes().items())
    SIZES_FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
