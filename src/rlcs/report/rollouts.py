"""Finds rollouts of a run by stage, step, problem and reward, and draws pages of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rlcs.data.problem_store import PROBLEMS, ROLLOUTS
from rlcs.recipe.arms import TRAINING_ORDER
from rlcs.records import GradedSample, Problem, StopReason, from_row_or_none
from rlcs.report import pictures
from rlcs.report.load_run import Row, Run, by_reward, kept_images, read_records, read_rows, saved_steps, text
from rlcs.report.pages import templates, write_page

_MOST_FILES = 400
"""Most steps that are read for one page: a filter with few matches must not read all of a long run."""
VERDICTS = {
    "": "any",
    "right": "right",
    "wrong": "wrong",
    "unscored": "not scored",
    "cut": "cut at the limit",
}
"""The values of a filter by grade, with their labels."""
_STATIC_STEPS = 6
_STATIC_GROUPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A filter of rollouts; empty values match all. `verdict` is one of VERDICTS."""

    seed: str = ""
    stage: str = ""
    step: int | None = None
    problem: str = ""
    verdict: str = ""
    least: float | None = None
    most: float | None = None
    skip: int = 0

    def takes(self, one: GradedSample) -> bool:
        """Whether the filter matches a rollout."""
        grade = one.grade
        verdicts = {"right": grade.correct is True, "wrong": grade.correct is False}
        verdicts |= {"unscored": not grade.scored, "cut": one.sample.stop is StopReason.LENGTH}
        if self.problem.lower() not in one.sample.id.lower() or not verdicts.get(self.verdict, True):
            return False
        if self.least is None and self.most is None:
            return True
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        return grade.reward is not None and low <= grade.reward <= high


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The rollouts of one problem in one step; `problem` is None where the run did not keep it."""

    step: int
    id: str
    problem: Problem | None
    rollouts: tuple[GradedSample, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One page of groups: whether there are `more`, the stage's `steps`, how many of them were `read`."""

    groups: tuple[Family, ...]
    more: bool
    steps: tuple[int, ...]
    read: int


def stages_of(run: Path) -> list[str]:
    """The stages of one run folder that have rollouts."""
    return [stage for stage in TRAINING_ORDER if saved_steps(run / stage / ROLLOUTS)]


def find(run: Path, wanted: Wanted, *, count: int = 12, known: Mapping[str, Row] | None = None) -> Found:
    """Groups of one stage, newest step first; `known` are the rows of its problems, if they were read."""
    folder = run / wanted.stage / ROLLOUTS
    files = saved_steps(folder)
    chosen = [s for s in sorted(files, reverse=True) if wanted.step in (None, s)][:_MOST_FILES]
    known = _problems(run, wanted.stage) if known is None else known
    groups: list[Family] = []
    read = 0
    for step in chosen:
        read += 1
        groups += _groups(files[step], step, known, wanted)
        if len(groups) > wanted.skip + count:
            break
    page = groups[wanted.skip : wanted.skip + count]
    more = len(groups) > wanted.skip + count
    return Found(groups=tuple(page), more=more, steps=tuple(files), read=read)


def _problems(run: Path, stage: str) -> dict[str, Row]:
    """The rows of a stage's problems by their ids."""
    return {text(row, "id"): row for row in read_rows(run / stage / ROLLOUTS / PROBLEMS)}


def sample(run: Path, stage: str) -> Found:
    """The groups of a few steps, first and last among them, for a page that must stay small."""
    steps = list(saved_steps(run / stage / ROLLOUTS))
    last = len(steps) - 1
    chosen = sorted({steps[round(i * last / (_STATIC_STEPS - 1))] for i in range(_STATIC_STEPS)})
    known = _problems(run, stage)
    pages = [find(run, Wanted(stage=stage, step=step), count=_STATIC_GROUPS, known=known) for step in chosen]
    groups = tuple(group for page in pages for group in page.groups)
    return Found(groups=groups, more=True, steps=tuple(steps), read=len(chosen))


def render(
    name: str, pages: Sequence[tuple[Path, str, Found]], *, wanted: Wanted | None = None, **live: object
) -> str:
    """The page of (run folder, stage, groups); with `wanted` the live one, with a form and links."""
    shown = sum(len(_images(group)) for _, _, found in pages for group in found.groups)
    share = pictures.TOTAL_BYTES // max(1, shown)
    prepared = []
    for run, stage, found in pages:
        folder = run / stage / ROLLOUTS
        cards = [(g, pictures.embed(folder, _images(g)[:4], most_bytes=share)) for g in found.groups]
        steps = [(step, list(same)) for step, same in groupby(cards, key=lambda card: card[0].step)]
        prepared.append((stage, found, steps))
    facts: dict[str, object] = {"links": [], "seeds": [], "choices": [], **live}
    return (
        templates()
        .get_template("rollouts.html.j2")
        .render(name=name, pages=prepared, wanted=wanted, live=wanted is not None, verdicts=VERDICTS, **facts)
    )


def write_sample(folder: Path, runs: Sequence[Run], name: str) -> None:
    """Write report/rollouts.html, if there are rollouts: a few steps of each stage of the first run."""
    run = runs[0].folder
    pages = [(run, stage, sample(run, stage)) for stage in stages_of(run)]
    if pages:
        write_page(folder / "report" / "rollouts.html", render(name, pages))


def _images(group: Family) -> list[str]:
    return kept_images(group.problem) if group.problem else []


def _groups(path: Path, step: int, known: Mapping[str, Row], wanted: Wanted) -> Iterator[Family]:
    members: dict[str, list[GradedSample]] = {}
    for one in filter(wanted.takes, read_records(GradedSample, path)):
        members.setdefault(one.sample.id, []).append(one)
    for name, rollouts in members.items():
        problem = from_row_or_none(Problem, known[name]) if name in known else None
        yield Family(step=step, id=name, problem=problem, rollouts=by_reward(rollouts))
