"""What ails a run: read from its metrics, logs and checkpoints, each finding with the way out."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from rlcs import storage
from rlcs.doctor import Finding
from rlcs.errors import CheckpointError, RunFolderError
from rlcs.recipe.arms import ARMS, TRAINING_ORDER
from rlcs.report import findings
from rlcs.report.load_run import Run, number, read_object, read_runs
from rlcs.report.progress import ending, progress

_TAIL = 10  # steps
_ALIVE_S = 300  # seconds without a sign of life, after which a run counts as stopped
_READ = "read some: rlcs report RUN --live"
_KL = "grpo.kl.kind=k3 grpo.kl.coefficient=0.01"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A value that is ill when the mean of its last steps is above `most`; `told` gets that mean."""

    key: str
    most: float
    name: str
    told: str
    fix: str


LIMITS = (
    Limit(key="zero_variance_groups", most=0.8, name="flat groups",
          told="{:.0%} of the groups have equal rewards",
          fix="grpo.dynamic_sampling=2, or choose problems by difficulty (data.rl_pass_rate)"),
    Limit(key="kl", most=1.0, name="KL explosion", told="KL from the reference is {:.2g} nats a token",
          fix="halve grpo.optimizer.lr, or raise grpo.kl.coefficient"),
    Limit(key="truncated", most=0.2, name="length limit", told="{:.0%} of the answers are cut at the limit",
          fix="raise grpo.max_new_tokens, or set grpo.overlong.buffer"),
    Limit(key="boxes_per_answer", most=1.5, name="boxes", told="{:.1f} boxes an answer: guesses are spread",
          fix=f"{_READ}; more cold-start data, or {_KL}"),
    Limit(key="no_format_share", most=0.2, name="format", told="{:.0%} of the answers have no box to read",
          fix=f"{_READ}; more cold-start data, or longer answers (grpo.max_new_tokens)"),
    Limit(key="repeated_share", most=0.1, name="repetition", told="{:.0%} of the answers repeat themselves",
          fix=f"halve grpo.optimizer.lr, or {_KL}"),
    Limit(key="unscored", most=0.05, name="unscored", told="{:.0%} of the answers could not be graded",
          fix="raise grpo.reward.deadline_s; the reasons stand in rollouts/ (why)"),
    Limit(key="sampler_gap", most=0.05, name="sampler gap", told="the policy is {:.2g} nats off the sampler",
          fix="run rlcs doctor; set model.attention=dense"),
)  # fmt: skip


def examine(folder: Path) -> list[Finding]:
    """Everything that ails a run folder. Raises RunFolderError where no run is."""
    runs = read_runs(folder)
    if not any(run.recipe or run.curves for run in runs):
        raise RunFolderError(
            "no run is here", where=str(folder), fix="give the folder with recipe.yaml in it"
        )
    found = []
    for run in runs:
        seed = f"{run.folder.name}: " if len(runs) > 1 else ""
        each = [*_course(run, folder), *_checkpoints(run), *_training(run), *_result(run)]
        found += [Finding(name=seed + one.name, told=one.told, fix=one.fix) for one in each]
    return [*found, _disk(folder, runs)]


def _course(run: Run, folder: Path) -> Iterator[Finding]:
    """Done, or where it stopped and how it goes on."""
    left = [row for row in progress(run) if row.state != "done"]
    if not left:
        yield Finding(name="course", told="every stage is done")
        return
    at, why = left[0], ending(run)
    where = at.name + (f", {at.done:,} of {at.total:,}" if at.total else "")
    touched = [
        path.stat().st_mtime for path in (*run.folder.glob("*/metrics.jsonl"), *run.folder.glob("logs/*"))
    ]
    if not why and time.time() - max(touched, default=0.0) < _ALIVE_S:
        yield Finding(name="course", told=f"running: {where}")
        return
    seeds = number(read_object(folder / "seeds.json"), "count") or len(list(folder.glob("seed-*")))
    verb = "run" if run.folder == folder else f"ablate --seeds {seeds:.0f}"
    resume = f"it goes on with: rlcs {verb} {folder / 'recipe.yaml'} --out {folder}"
    yield Finding(name="course", told=f"stopped: {where}" + (f"; ended by {why}" if why else ""), fix=resume)


def _checkpoints(run: Run) -> Iterator[Finding]:
    for stage in TRAINING_ORDER:
        folder = run.folder / stage / "checkpoints"
        whole = []
        for path in sorted(folder.glob("step-*")):
            if path.name[5:].isdigit():
                try:
                    storage.verify_manifest(path)
                    whole.append(path.name)
                except CheckpointError as error:
                    told = f"{ARMS[stage].stage} {path.name} is torn: {error.what}"
                    yield Finding(name="checkpoint", told=told, fix="nothing: resume takes the one before it")
            elif ".bad" in path.name:
                told = f"{ARMS[stage].stage} {path.name} was damaged and set aside"
                yield Finding(name="checkpoint", told=told, fix="nothing: an older one was taken; remove it")
            else:
                told = f"{ARMS[stage].stage} has {path.name}, left by a save that died"
                yield Finding(name="checkpoint", told=told, fix="nothing: the next start tidies up")
        if whole:
            yield Finding(name="checkpoint", told=f"{ARMS[stage].stage}: {', '.join(whole)} verified")


def _training(run: Run) -> Iterator[Finding]:
    for stage, rows in run.curves.items():
        curves = {key: [v for _, v in findings.series(rows, key)] for key in {k for row in rows for k in row}}
        for one in (*_signs(curves), *_limits(curves)) if stage != "sft" else ():
            yield Finding(name=f"{ARMS[stage].stage}: {one.name}", told=one.told, fix=one.fix)
        bad = [row for row in rows if row.get("skipped") and "flat" not in str(row["skipped"])]
        if bad:
            told = f"{len(bad):,} of {len(rows):,} steps were skipped, the last: {bad[-1]['skipped']}"
            fix = f"halve {'sft' if stage == 'sft' else 'grpo'}.optimizer.lr, or model.dtype=float32"
            yield Finding(name=f"{ARMS[stage].stage}: bad steps", told=told, fix=fix)
        norms = curves.get("grad_norm", [])
        if len(norms) > _TAIL and max(norms[-_TAIL:]) > 100 * median(norms):
            told = f"the gradient norm reached {max(norms[-_TAIL:]):.3g}, its median is {median(norms):.3g}"
            yield Finding(
                name=f"{ARMS[stage].stage}: gradients", told=told, fix="halve the stage's optimizer.lr"
            )


def _signs(curves: dict[str, list[float]]) -> Iterator[Finding]:
    """What needs more than the last mean."""
    rewards = curves.get("reward", [])[-_TAIL:]
    if len(rewards) == _TAIL and max(rewards) - min(rewards) < 1e-6:
        easy = rewards[-1] > 0
        told = f"the reward has been {rewards[-1]:.3g} in each of the last {_TAIL} steps"
        hard = "easier problems, a longer cold start, or a reward that reads these answers: " + _READ
        fix = "nothing is left to learn: stop here, or harder problems" if easy else hard
        yield Finding(name="flat reward", told=told, fix=fix)
    lengths = curves.get("response_tokens", [])
    if len(lengths) > _TAIL:
        first, last = fmean(lengths[:_TAIL]), fmean(lengths[-_TAIL:])
        if last < 0.3 * first:
            told = f"answers shrank from {first:.0f} to {last:.0f} tokens"
            yield Finding(name="length collapse", told=told, fix=f"{_READ}; more cold-start data, or {_KL}")
    entropy = curves.get("entropy", [])
    if len(entropy) > _TAIL and fmean(entropy[-_TAIL:]) < 0.1 * fmean(entropy[:_TAIL]):
        told = f"entropy fell from {fmean(entropy[:_TAIL]):.2g} to {fmean(entropy[-_TAIL:]):.2g} nats"
        fix = "raise grpo.clip_high or grpo.temperature: nothing new is tried"
        yield Finding(name="entropy collapse", told=told, fix=fix)


def _limits(curves: dict[str, list[float]]) -> Iterator[Finding]:
    for limit in LIMITS:
        last = curves.get(limit.key, [])[-_TAIL:]
        if last and fmean(last) > limit.most:
            yield Finding(name=limit.name, told=limit.told.format(fmean(last)), fix=limit.fix)


def _result(run: Run) -> Iterator[Finding]:
    for gap in findings.differences([run]):
        if gap.high < 0:
            told = f"two stages are {-100 * gap.points:.1f} points worse than {ARMS[gap.arm].label}"
            yield Finding(name="result", told=told, fix="keep that arm's model, and see the signs above")


def _disk(folder: Path, runs: Sequence[Run]) -> Finding:
    free = shutil.disk_usage(folder).free
    sizes = [
        sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
        for run in runs
        for step in run.folder.glob("*/checkpoints/step-*")
    ]
    need = 2 * max(sizes, default=0)
    told = f"{free / 2**30:.1f} GiB free; a checkpoint of this run takes {need / 2**31:.1f} GiB"
    full = free < max(need, 1 << 28)
    return Finding(name="disk", told=told, fix="make room: the next save may fail" if full else "")
