"""The user's reward function, `FILE.py:NAME`: checked before a run, called only in killable workers.

It is called as `NAME(problem, response)`: `problem` is a dict of `question`, `answer`, `choices` and
`metadata`, `response` the text of the answer. It returns the reward, a finite number, or a pair of
the reward and whether the answer is correct; a reward alone is correct from 1 up. If it raises an
exception, the answer is unscored.
"""

import ast
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path

from rlcs.errors import RecipeError
from rlcs.records import Grade, Problem

KEY = "grpo.reward.function"


def check_function(function: str) -> str:
    """Make the path in `FILE.py:NAME` absolute. Raises RecipeError without such a function; runs no code."""
    file, _, name = function.rpartition(":")
    path = Path(file).expanduser().resolve()
    fix = "write it as FILE.py:NAME"
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
        listed = ", ".join(known) or "none"
        raise RecipeError(f"{path} has no function {name!r}", where=KEY, fix=f"its functions: {listed}")
    return f"{path}:{name}"


def load_function(location: str) -> Callable[[str, str], Grade]:
    """Run the file and wrap its function as a grader: (problem as JSON, response) -> grade."""
    file, _, name = location.rpartition(":")
    function = runpy.run_path(file)[name]

    def decide(problem: str, response: str) -> Grade:
        try:
            result = function(json.loads(problem), response)
            reward, correct = result if isinstance(result, tuple) else (result, result >= 1)
            if not math.isfinite(reward):
                raise ValueError(f"the reward is {reward}")
            return Grade(reward=float(reward), correct=bool(correct), why="by the reward function")
        except Exception as error:
            why = f"{name} failed: {type(error).__name__}: {error}"
            return Grade(reward=None, correct=None, why=why)

    return decide


def problem_json(problem: Problem) -> str:
    """Encode the fields of a problem that the function receives."""
    fields = {
        "question": problem.question,
        "answer": problem.answer,
        "choices": list(problem.choices),
        "metadata": dict(problem.metadata),
    }
    return json.dumps(fields, default=str)
