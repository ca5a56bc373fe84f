"""Finds problems of a run in its metrics, logs and checkpoints, each with a fix."""

import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

from rlcs import storage
from rlcs.doctor import Finding
from rlcs.errors import CheckpointError
from rlcs.recipe.arms import ARMS, TRAINING_ORDER
from rlcs.records import NO_SIGNAL
from rlcs.report import findings
from rlcs.report.coldstart import is_study
from rlcs.report.coldstart_results import read
from rlcs.report.differences import differences
from rlcs.report.load_run import Run, number, read_object, require_runs
from rlcs.report.stages import ending, progress
from rlcs.train.collapse import FOLDER, RESULT, kept_crossings
from rlcs.train.health import HOLD_POLICY, LAST_STEPS, READ_ROLLOUTS

_ALIVE_S = 300  # a run counts as stopped when its files have not changed for so many seconds


def examine(folder: Path) -> list[Finding]:
    """The findings about a run folder. Raises RunFolderError where there is no run."""
    runs = require_runs(folder)
    if is_study(folder):
        return [_cells(folder), _disk(folder, runs)]
    found = []
    for run in runs:
        seed = f"{run.folder.name}: " if len(runs) > 1 else ""
        of_run = [_state(run, folder), *_checkpoints(run), *_signs(run), *_trends(run), *_result(run)]
        found += [replace(finding, name=seed + finding.name) for finding in of_run]
    return [*found, _disk(folder, runs)]


def _cells(folder: Path) -> Finding:
    """How far a study of the cold start is, with the command that continues it."""
    study = read(folder)
    command = study.facts.get("command")
    resume = f"continue it, where it does not run: {shlex.join(map(str, command))}" if command else ""
    state = f"{study.over} of {study.cells} cells are over"
    return Finding(name="state", message=state, fix=resume if study.over < study.cells else "")


def _state(run: Run, folder: Path) -> Finding:
    """Whether the run is done, running or stopped, with the command that continues it."""
    left = [row for row in progress(run) if row.state != "done"]
    if not left:
        return Finding(name="state", message="every stage is done")
    at, why = left[0], ending(run)
    where = at.name + (f", {at.done:,} of {at.total:,}" if at.total else "")
    files = (*run.folder.glob("*/metrics.jsonl"), *run.folder.glob("logs/*"))
    if not why and time.time() - max((path.stat().st_mtime for path in files), default=0.0) < _ALIVE_S:
        return Finding(name="state", message=f"running: {where}")
    seeds = number(read_object(folder / "seeds.json"), "count") or len(list(folder.glob("seed-*")))
    verb = "run" if run.folder == folder else f"ablate --seeds {seeds:.0f}"
    resume = f"continue it with: rlcs {verb} {folder / 'recipe.yaml'} --out {folder}"
    return Finding(
        name="state", message=f"stopped: {where}" + (f"; ended by {why}" if why else ""), fix=resume
    )


def _checkpoints(run: Run) -> Iterator[Finding]:
    for stage in TRAINING_ORDER:
        whole = []
        for path in sorted((run.folder / stage / "checkpoints").glob("step-*")):
            if path.name[5:].isdigit():
                try:
                    storage.verify_manifest(path)
                    whole.append(path.name)
                    continue
                except CheckpointError as error:
                    state, fix = f"is torn: {error.what}", "nothing: resume takes the one before it"
            elif ".bad" in path.name:
                state, fix = "was damaged and set aside", "nothing: an older one was taken; remove it"
            else:
                state, fix = "is left of a killed save", "nothing: the next start removes it"
            yield Finding(name="checkpoint", message=f"{ARMS[stage].stage} {path.name} {state}", fix=fix)
        if whole:
            yield Finding(name="checkpoint", message=f"{ARMS[stage].stage}: {', '.join(whole)} verified")


def _signs(run: Run) -> Iterator[Finding]:
    """The warning signs whose last values are above their limits."""
    for row in findings.health([run]):
        for stage, (_, last) in row.stages.items():
            if last > row.sign.most:
                name = f"{ARMS[stage].stage}: {row.sign.name}"
                yield Finding(name=name, message=row.sign.message(last), fix=row.sign.fix)


def _trends(run: Run) -> Iterator[Finding]:
    """Problems that show in the course of training, not in the mean of its last steps."""
    for stage, rows in run.curves.items():
        section = "sft" if stage == "sft" else "grpo"
        curves = {key: [v for _, v in findings.series(rows, key)] for key in {k for row in rows for k in row}}
        found = [] if stage == "sft" else [*_collapses(curves), *_kept_collapses(run, stage)]
        bad = [row for row in rows if row.get("skipped") and row["skipped"] != NO_SIGNAL]
        if bad:
            message = f"{len(bad):,} of {len(rows):,} steps were skipped, the last: {bad[-1]['skipped']}"
            fix = f"halve {section}.optimizer.lr, or model.dtype=float32"
            found.append(Finding(name="bad steps", message=message, fix=fix))
        norms = curves.get("grad_norm", [])
        worst = max(norms[-LAST_STEPS:], default=0.0)
        if len(norms) > LAST_STEPS and worst > 100 * median(norms):
            message = f"the gradient norm reached {worst:.3g}, its median is {median(norms):.3g}"
            found.append(Finding(name="gradients", message=message, fix=f"halve {section}.optimizer.lr"))
        yield from (replace(finding, name=f"{ARMS[stage].stage}: {finding.name}") for finding in found)


def _kept_collapses(run: Run, stage: str) -> Iterator[Finding]:
    """The signs that crossed their limits while the stage trained, and what is known about them."""
    folder = run.folder / stage / FOLDER
    for crossing in kept_crossings(folder):
        result = read_object(folder / f"step-{crossing.step:06d}" / RESULT)
        known = result.get("fixes")
        words = [" ".join(each["words"]) for each in known] if isinstance(known, list) else []
        fix = " or ".join(words) or f"rlcs doctor {run.folder} --replay finds out which change prevents it"
        yield Finding(name="collapse", message=f"in step {crossing.step:,}: {crossing.message}", fix=fix)


def _collapses(curves: Mapping[str, Sequence[float]]) -> Iterator[Finding]:
    """Rewards that do not change; answer lengths and entropy that fell far below those of the first steps."""
    rewards = curves.get("reward", [])[-LAST_STEPS:]
    if len(rewards) == LAST_STEPS and max(rewards) - min(rewards) < 1e-6:
        message = f"the reward has been {rewards[-1]:.3g} in each of the last {LAST_STEPS} steps"
        easy = "nothing is left to learn: stop here, or harder problems"
        hard = f"easier problems, a longer cold start, or a reward that reads these answers: {READ_ROLLOUTS}"
        yield Finding(name="flat reward", message=message, fix=easy if rewards[-1] > 0 else hard)
    for key, name, share, form, fix in (
        ("response_tokens", "length collapse", 0.3, "answers shrank from {:.0f} to {:.0f} tokens",
         f"{READ_ROLLOUTS}; more cold-start data, or {HOLD_POLICY}"),
        ("entropy", "entropy collapse", 0.1, "entropy fell from {:.2g} to {:.2g} nats",
         "raise grpo.clip_high or grpo.temperature: nothing new is tried"),
    ):  # fmt: skip
        values = curves.get(key, [])
        if len(values) > LAST_STEPS:
            first, last = fmean(values[:LAST_STEPS]), fmean(values[-LAST_STEPS:])
            if last < share * first:
                yield Finding(name=name, message=form.format(first, last), fix=fix)


def _result(run: Run) -> Iterator[Finding]:
    for gap in differences([run]):
        if gap.arm == "sft_grpo" and gap.high < 0:
            message = f"two stages are {-100 * gap.points:.1f} points worse than {ARMS[gap.against].label}"
            yield Finding(
                name="result", message=message, fix="keep that arm's model, and see the signs above"
            )


def _disk(folder: Path, runs: Sequence[Run]) -> Finding:
    free = shutil.disk_usage(folder).free
    steps = (step for run in runs for step in run.folder.glob("*/checkpoints/step-*"))
    sizes = (sum(path.stat().st_size for path in step.rglob("*") if path.is_file()) for step in steps)
    need = 2 * max(sizes, default=0)
    message = f"{free / 2**30:.1f} GiB free; a checkpoint of this run takes {need / 2**31:.1f} GiB"
    full = free < max(need, 1 << 28)
    return Finding(name="disk", message=message, fix="free some: the next save may fail" if full else "")
