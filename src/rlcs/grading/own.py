"""The user's reward functions, `FILE.py:NAME`: checked before a run, called only in killable workers.

One is called as `NAME(problem, response)`: `problem` is a dict of `question`, `history` (the turns before it,
each a dict of `role` and `text`), `answer`, `choices` and `metadata`, `response` the text of the answer. It
returns the reward, a number of at most 1,000,000 in size, or a pair of the reward and whether the answer is
correct; a reward alone is correct from 1 up. If it raises an exception, the answer is unscored.
"""

import ast
import json
import math
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import SupportsFloat

from rlcs.errors import RecipeError
from rlcs.records import Grade, Problem
from rlcs.storage import at_home

KEY = "grpo.reward.functions"
_LONGEST_MESSAGE = 300
_LARGEST_REWARD = 1_000_000  # times the largest weight it is far from what a float can hold


def check_function(function: str) -> str:
    """Make the path in `FILE.py:NAME` absolute. Raises RecipeError without such a function; runs no code."""
    file, _, name = function.rpartition(":")
    path = at_home(file).resolve()
    fix = "write it as {FILE.py:NAME: WEIGHT}"
    if not file or not name.isidentifier():
        raise RecipeError(f"{function!r} names no function", where=KEY, fix=fix)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", where=KEY, fix=fix) from error
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{path} is no Python: {error}", where=KEY, fix="correct the file") from error
    known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name not in known:
        listed, what = ", ".join(known) or "none", f"{path} has no function {name!r}"
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.AsyncFunctionDef) and node.name == name:
                kind = "a class" if isinstance(node, ast.ClassDef) else "an async function (`async def`)"
                what = f"{name!r} in {path} is {kind}, not a plain function (`def`)"
        raise RecipeError(what, where=KEY, fix=f"its functions: {listed}")
    return f"{path}:{name}"


def load_function(location: str) -> Callable[[str, str], Grade]:
    """Import the file and wrap its function as a grader: (problem as JSON, response) -> grade.

    If the file cannot be imported, every answer is unscored for that reason.
    """
    file, _, name = location.rpartition(":")
    sys.path.insert(0, str(Path(file).parent))  # as for `python FILE.py`: it may import its neighbours
    try:
        function = getattr(_import(file), name)
    except (Exception, SystemExit) as error:
        failure = _unscored(error, file)
        return lambda problem, response: failure

    def decide(problem: str, response: str) -> Grade:
        try:
            return _grade_of(function(json.loads(problem), response))
        except Exception as error:
            return _unscored(error, file)

    return decide


def _import(file: str) -> ModuleType:
    """Import a file as a module: what is defined in it can then be pickled, and its annotations resolved."""
    name = Path(file).stem
    while name in sys.modules:  # such as json.py: libraries need the other module
        name += "_"
    spec = spec_from_file_location(name, file, loader=SourceFileLoader(name, file))
    assert spec and spec.loader, "a loader was given"
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _grade_of(result: object) -> Grade:
    """The grade of what a function returned. Raises TypeError, ValueError."""
    reward, correct = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(reward, SupportsFloat):
        shown = repr(result)[:_LONGEST_MESSAGE]
        raise TypeError(f"it returned {shown}, neither a number nor a pair (number, is it correct)")
    value = float(reward)
    if not math.isfinite(value):
        raise ValueError(f"the reward is {value}")
    if abs(value) > _LARGEST_REWARD:
        raise ValueError(f"the reward is {value:g}, larger than {_LARGEST_REWARD:,} in size")
    return Grade(
        reward=value, correct=bool(value >= 1 if correct is None else correct), why="by the reward function"
    )


def _unscored(error: BaseException, file: str) -> Grade:
    """An unscored grade with the exception, and the last line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = ":".join([file, *map(str, lines[-1:])])
    message = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    return Grade(reward=None, correct=None, why=f"{type(error).__name__}: {message} ({place})")


def problem_json(problem: Problem) -> str:
    """Encode the fields of a problem that a function receives."""
    fields = {
        "question": problem.question,
        "history": [{"role": turn.role, "text": turn.text} for turn in problem.history],
        "answer": problem.answer,
        "choices": list(problem.choices),
        "metadata": dict(problem.metadata),
    }
    return json.dumps(fields, default=str)
