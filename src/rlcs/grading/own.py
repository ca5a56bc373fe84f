"""The user's reward functions, `FILE.py:NAME`: checked before a run, called only in killable workers.

One is called as `NAME(problem, response)`: `problem` is a dict of `question`, `history` (the turns before it,
each a dict of `role` and `text`), `answer`, `choices` and `metadata`, `response` the text of the answer. It
returns the reward, a number of at most 1,000,000 in size, or a pair of the reward and whether the answer is
correct; a reward alone is correct from 1 up. An `async def` is awaited. If it raises an exception, the answer
is unscored.
"""

import ast
import asyncio
import math
import sys
import traceback
from collections.abc import Callable, Coroutine
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from json import dumps, loads  # by name, as the function's file may replace what stands in the module
from pathlib import Path
from types import ModuleType
from typing import SupportsFloat

from rlcs.errors import DataError, RecipeError
from rlcs.records import Grade, Problem
from rlcs.storage import at_home, read_regular

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
        tree = ast.parse(read_regular(path))
    except DataError as error:
        raise RecipeError(f"cannot read {path}: {error.what}", where=KEY, fix=fix) from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", where=KEY, fix=fix) from error
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{path} is no Python: {error}", where=KEY, fix="correct the file") from error
    known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if name not in known:
        listed, what = ", ".join(known) or "none", f"{path} has no function {name!r}"
        if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
            what = f"{name!r} in {path} is a class, not a function (`def`)"
        raise RecipeError(what, where=KEY, fix=f"its functions: {listed}")
    return f"{path}:{name}"


def load_function(location: str) -> Callable[[str, str], Grade]:
    """Import the file and wrap its function as a grader: (problem as JSON, response) -> grade.

    If the file cannot be imported, every answer is unscored for that reason.
    """
    file, _, name = location.rpartition(":")
    sys.path.insert(0, str(Path(file).parent))  # as for `python FILE.py`: it may import its neighbours
    runner = asyncio.Runner()  # one for all answers, so that a function can keep its connections
    try:
        function = getattr(_import(file), name)
    except BaseException as error:
        failure = _unscored(error, location)
        return lambda problem, response: failure

    def decide(problem: str, response: str) -> Grade:
        try:
            result = function(loads(problem), response)
            return _grade_of(runner.run(result) if isinstance(result, Coroutine) else result)
        except BaseException as error:  # whatever it is, it ends no worker and no run
            return _unscored(error, location)

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


def _unscored(error: BaseException, location: str) -> Grade:
    """An unscored grade with the exception, and the last line of the user's file that led to it."""
    file, _, name = location.rpartition(":")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = ":".join([file, *map(str, lines[-1:])])
    try:
        message = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    except BaseException:
        message = "it cannot be printed"
    kind = type(error).__name__
    return Grade(reward=None, correct=None, why=f"{name}: {kind}: {message} ({place})")


def problem_json(problem: Problem) -> str:
    """Encode the fields of a problem that a function receives."""
    fields = {
        "question": problem.question,
        "history": [{"role": turn.role, "text": turn.text} for turn in problem.history],
        "answer": problem.answer,
        "choices": list(problem.choices),
        "metadata": dict(problem.metadata),
    }
    return dumps(fields, default=str)
