"""The whole of `rlcs doctor --gpu`: finds GPUs and vLLM, runs the checks, makes the table and its JSON."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import device_name
from rlcs.doctor.gpu.ranks import all_ranks
from rlcs.doctor.gpu.runner import SPECS, Spec, run
from rlcs.doctor.gpu.table import table, to_json
from rlcs.errors import UserError

VLLM = "vllm"
"""vLLM's program where none is named; that check is skipped where it is not installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The results: lines for the screen, and a JSON-able object."""

    lines: Sequence[str]
    content: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return bool(self.content["ok"])


def examine_gpus(
    *,
    minutes: float,
    executable: str,
    cpu: bool,
    say: Callable[[str], None],
    specs: Sequence[Spec] = SPECS,
) -> Report:
    """Run the checks on every GPU, or with a small model on the CPU. Raises UserError without any GPU."""
    gpus = torch.cuda.device_count()
    if not (gpus or cpu):
        fix = "install the driver, and a torch for its CUDA: see https://pytorch.org; or leave out --gpu"
        raise UserError("torch sees no GPU on this machine", where="rlcs doctor --gpu", fix=fix)
    program = find_vllm(executable)
    ranks = all_ranks(1 if cpu else gpus)
    with tempfile.TemporaryDirectory(prefix=".rlcs-doctor-", dir=_place()) as own:
        folder = ranks.agree("folder", own)
        setting = Setting(folder=folder, executable=program, cpu=cpu)
        checks: list[Check] = run(specs, setting, ranks, minutes=minutes, say=say)
        ranks.agree("end", "")  # rank 0's folder is removed when the others need it no more
    name = "CPU" if cpu else device_name(torch.device("cuda", 0))
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return Report(lines=table(checks, width), content=to_json(checks, device=name, ranks=ranks.size))


def find_vllm(executable: str) -> str:
    """The path of vLLM's program, by its path or its name beside this Python or on PATH; "" without one.

    Raises UserError where another name than `vllm` was given and is not there.
    """
    beside = Path(sys.executable).parent
    found = shutil.which(executable) or shutil.which(executable, path=str(beside)) or ""
    if not found and executable not in ("", VLLM):
        fix = "give the path of vLLM's program, such as vllm-env/bin/vllm"
        raise UserError(f"there is no program {executable}", where="--executable", fix=fix)
    return found


def _place() -> str | None:
    """The current folder, whose disk runs would use; None, the system's, where it cannot be written."""
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return str(Path.cwd())
    except OSError:
        return None
