"""`rlcs doctor --gpu`: proves within minutes, and without network, that a machine with GPUs is ready.

Each check is one module with a function `check(setting)`. It runs in a process of its own (one for each GPU
where that makes sense), which the runner ends when it hangs: a check that crashes or runs out of memory costs
no other check. What is measured on the way becomes the rates with which `rlcs plan --measured` plans.

With `cpu` the same checks run on a CPU with a small model: that is how they are tested.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What every check is given: a scratch folder, the program of vLLM ("": none), small on a CPU or real."""

    folder: str
    executable: str = ""
    cpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The result of one check; `ok` is None where it was skipped, and `fix` says what to do otherwise.

    `values` are all that was measured, `rates` those of them that a plan uses (`plan.measured.Rates`).
    """

    name: str = ""
    ok: bool | None
    message: str
    fix: str = ""
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


REPORT = "please report it with this table's JSON (--out FILE)"
"""What to do about a fault of rlcs, or of a library."""
