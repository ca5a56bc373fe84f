"""The process of one check: `python -m rlcs.doctor.gpu MODULE SETTING.json RESULT.json`."""

import importlib
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from rlcs.doctor.gpu import REPORT, Check, Setting
from rlcs.errors import NEED_LESS, RlcsError, shortage
from rlcs.storage import atomic_write, read_json


def main(module: str, setting: str, result: str) -> None:
    """Run the module's check, and write its result, whatever it raises."""
    try:
        found: Check = importlib.import_module(module).check(Setting(**read_json(Path(setting))))
    except RlcsError as error:
        found = Check(ok=False, message=error.what, fix=error.fix or REPORT)
    except Exception as error:  # any error is the check's result
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        found = Check(ok=False, message=shortage(text) or text, fix=NEED_LESS if shortage(text) else REPORT)
    # JSON has no NaN and no infinity, which a wrong computation may give; Python's own reader takes them.
    atomic_write(Path(result), json.dumps(asdict(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
