"""Problems to try on the chat page: held-out ones of the run that a model comes from, or built-in puzzles."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rlcs.data import puzzles
from rlcs.data.images import encoded_image, image_kind
from rlcs.data.problem_store import PROBLEMS
from rlcs.errors import DataError
from rlcs.model.source import BUILTIN, part_of_run
from rlcs.records import IMAGE_SLOT, Problem
from rlcs.records.rows import from_row_or_none
from rlcs.storage import at_home, jsonl_lines, parse_object

MOST = 6
_ROWS_READ = 200
"""Rows of a run's problems that are looked at, for those with images."""


def example_problems(names: Sequence[str], folder: Path) -> list[tuple[str, list[str]]]:
    """Questions for these models, each with the files of its images, which are written to `folder`.

    They come from the run of the first model that has one, or are puzzles for a built-in model. Other
    models have none.
    """
    run = next((run for name in names if (run := run_of(name)) is not None), None)
    problems: Iterable[Problem] = ()
    if run is not None:
        problems = islice(_held_out(run / "eval"), MOST)
    elif BUILTIN.keys() & names:
        problems = puzzles.load("puzzles", split="test", count=MOST, seed=11)
    examples = []
    for problem in problems:
        files = []
        for image in problem.images:
            data = encoded_image(image)
            path = folder / f"{image.sha256[:16]}.{image_kind(data)}"
            path.write_bytes(data)
            files.append(str(path))
        examples.append((problem.question_with_choices.replace(IMAGE_SLOT, " ").strip(), files))
    return examples


def run_of(name: str) -> Path | None:
    """The run folder that a model is, or lies in, if its measurement has begun."""
    part = part_of_run(at_home(name))
    return part[0] if part is not None and (part[0] / "eval" / PROBLEMS).exists() else None


def _held_out(folder: Path) -> Iterator[Problem]:
    """Problems that a page can show: with images that are there, and no turns before the question."""
    for _, line in islice(jsonl_lines(folder / PROBLEMS), _ROWS_READ):
        try:
            problem = from_row_or_none(Problem, parse_object(line))
        except ValueError:  # the last line, torn by a crash
            continue
        if problem is None or not problem.images or problem.history:
            continue
        stored = [image for image in problem.images if image.path is not None]
        images = [replace(image, path=str(folder / str(image.path))) for image in stored]
        with suppress(DataError):
            for image in images:
                encoded_image(image)
            if len(images) == len(problem.images):
                yield replace(problem, images=tuple(images))
