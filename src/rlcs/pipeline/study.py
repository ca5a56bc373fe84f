"""The whole study: data -> cold start -> SFT -> GRPO -> held-out measurement -> report.

Every stage leaves a marker when it is done; a run that was stopped picks up where it was, within
SFT and GRPO at the newest checkpoint, within a measurement at the last answer.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rlcs import distill, report
from rlcs.data.problem_store import ProblemStore
from rlcs.data.run_data import RunData
from rlcs.distributed import ALONE, World
from rlcs.engines.factory import EngineNeeds, MakeEngine, open_engines
from rlcs.errors import RlcsError, RunFolderError
from rlcs.evals.arms import CHUNK, Evaluator, evaluate
from rlcs.evals.scores import with_interval
from rlcs.generation import EngineSampler
from rlcs.grading import GradePool
from rlcs.grading.own import check_function
from rlcs.model import loading
from rlcs.model.attention import require_usable
from rlcs.progress import Screen, screen
from rlcs.recipe.arms import ARMS, RL_ARMS, TRAINING_ORDER
from rlcs.recipe.loading import differences, dump, load_recipe
from rlcs.recipe.schema import Grpo, Model, Recipe
from rlcs.records import Demonstration, Problem
from rlcs.signals import StopFlag
from rlcs.storage import atomic_write, read_json, write_json
from rlcs.train import grpo, sft
from rlcs.train.run_dir import RunDir, is_done, mark_done

"""The stage folder whose `final` each arm measures; the base model has none."""

_WORK = ("done.json", "manifest.json", "step-*.jsonl", "samples.jsonl", "predictions.jsonl")
"""Files of a run that hold something which took time."""

log = logging.getLogger("rlcs")


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a run speaks: `quiet` plain lines, or `json` rows."""

    quiet: bool = False
    json: bool = False

    def screen(self, stage: str, total: int) -> Screen:
        """The screen of one stage."""
        return screen(stage, total, quiet=self.quiet, json=self.json)


class Study:
    """One recipe, one seed, one run folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        sources: RunData,
        output: Output,
        stop: StopFlag,
        world: World = ALONE,
    ) -> None:
        """Claim the folder. Raises RunFolderError if it belongs to another recipe, UserError."""
        require_usable(recipe.model.attention, world.device or loading.default_device())
        self.recipe = recipe
        self.folder = folder
        self._sources = sources
        self._output = output
        self._stop = stop
        self._world = world
        world.first(lambda: claim(folder, recipe))
        # Arms may join a run later; what each trains does not change.
        alike = recipe.model_copy(update={"study": type(recipe.study)()})
        self._recipe_hash = hashlib.sha256(dump(alike).encode()).hexdigest()

    def run(self) -> dict[str, Any]:
        """Every stage that is not done yet; returns the summary, which also lies in summary.json."""
        if self._world.rank:
            log.setLevel(logging.ERROR)  # rank 0 warns, and keeps the log
        log_here = attempt_log(self.folder / "logs") if self._world.rank == 0 else nullcontext()
        with log_here, open_engines(EngineNeeds.of(self.recipe), self.folder / "rollout") as make_engine:
            return self._run(make_engine)

    def _run(self, make_engine: MakeEngine) -> dict[str, Any]:
        self._make_engine = make_engine
        sources = self._sources
        for line in sources.notes:
            log.warning(line)
        study = self.recipe.study
        demonstrations: Sequence[Demonstration] = ()
        if study.cold_starts:
            self._world.first(lambda: self._cold_start(sources))
            demonstrations = distill.load_kept(sources.cold_start, self.folder / "cold_start")
            self._sft(demonstrations)
        for arm in RL_ARMS:
            if arm in study.arms:
                self._grpo(arm, sources)
        self._measure(sources.test)
        return self._world.first(lambda: self._conclude(_counts(demonstrations, sources)))

    def _conclude(self, counts: dict[str, int]) -> dict[str, Any]:
        summary = {**self._summary(), "counts": counts}
        write_json(self.folder / "summary.json", summary)
        log.info("report: %s", report.build(self.folder))
        return summary

    def _cold_start(self, sources: RunData) -> None:
        folder = self.folder / "cold_start"
        started = time.monotonic()
        if is_done(folder):
            return
        rows, recipe = sources.cold_start, self.recipe
        with self._output.screen("cold start", sum(row.response is None for row in rows)) as view:
            kept = distill.run(
                rows, recipe.teacher, folder=folder, seed=recipe.seed, view=view, stop=self._stop
            )
        if failed := read_json(folder / "stats.json")["failed"]:  # no marker: else nobody asks them again
            raise RlcsError(
                f"the teacher left {failed:,} samples unanswered",
                where=str(folder),
                fix="the same command asks them again; to do without them, start in a new run folder with "
                f"data.cold_start={folder / 'kept.jsonl'}",
            )
        mark_done(folder, seconds=round(time.monotonic() - started, 1), kept=len(kept))

    def _is_done(self, name: str) -> bool:
        return self._world.first(lambda: is_done(self.folder / name))

    def _policy(self, start: Path | None, frozen: Sequence[str]) -> loading.Vlm:
        """The model of a training stage, with what trains in it set."""
        lora = self.recipe.lora
        vlm = self._load(self.recipe.learner, start, lora.four_bit)
        return loading.prepare(vlm, lora, frozen, seed=self.recipe.seed)

    def _weights_of(self, arm: str | None) -> Path | None:
        """The folder with an arm's trained model; None: the model that the recipe names."""
        return None if arm is None or ARMS[arm].parent is None else self.folder / arm / "final"

    def _vlm(self, start: Path | None) -> loading.Vlm:
        """A model that answers and never learns."""
        return self._load(self.recipe.model, start)

    def _load(self, settings: Model, start: Path | None, four_bit: bool = False) -> loading.Vlm:
        if start is not None:
            settings = settings.model_copy(update={"name": str(start), "revision": None})
        loading.give_back_memory()  # the model before this one, if it was sharded, lies in FSDP's circles
        return loading.load(settings, world=self._world, four_bit=four_bit)

    def _spread(self, vlm: loading.Vlm) -> loading.Vlm:
        return loading.spread(vlm, self.recipe.parallel)

    def _run_dir(self, name: str) -> RunDir:
        settings = self.recipe.sft if name == "sft" else self.recipe.grpo
        return RunDir(
            self.folder / name,
            name=name,
            seed=self.recipe.seed,
            settings=settings,
            recipe_hash=self._recipe_hash,
            world=self._world,
            trackers=self.recipe.trackers,
        )

    def _sft(self, demonstrations: Sequence[Demonstration]) -> None:
        if self._is_done("sft"):
            return
        self._world.check(self._stop, "before SFT")
        log.info("sft: %d demonstrations", len(demonstrations))
        vlm = self._spread(self._policy(None, self.recipe.sft.freeze))
        chat = loading.make_chat(vlm, self.recipe)
        steps = sft.steps_of(self.recipe.sft, len(demonstrations))
        with self._output.screen("sft", steps) as view:
            sft.train(
                vlm,
                chat,
                demonstrations,
                self.recipe.sft,
                folder=self._run_dir("sft"),
                screen=view,
                stop=self._stop,
            )

    def _grpo(self, name: str, sources: RunData) -> None:
        if self._is_done(name):
            return
        self._world.check(self._stop, f"before {name}")
        settings, start = self.recipe.grpo, self._weights_of(ARMS[name].parent)
        log.info("%s: %d problems, from %s", name, len(sources.rl), start or self.recipe.model.name)
        vlm = self._policy(start, settings.freeze)
        reference = None
        if settings.kl.active:
            vlm, reference = grpo.with_reference(vlm, self._spread)
        else:
            vlm = self._spread(vlm)
        chat = loading.make_chat(vlm, self.recipe, rl=True)
        if self.recipe.prompt.rl_system is not None:
            chat = chat.with_system(self.recipe.prompt.rl_system)
        engine = self._make_engine(vlm, chat, settings.max_rows)
        with self._pool(settings) as pool, self._output.screen(name, settings.steps) as view:
            grpo.train(
                grpo.GrpoContext(
                    vlm=vlm,
                    reference=reference,
                    chat=chat,
                    engine=engine,
                    pool=pool,
                    rollout=self.recipe.rollout,
                ),
                sources.rl,
                settings,
                folder=self._run_dir(name),
                screen=view,
                stop=self._stop,
            )

    def _pool(self, settings: Grpo) -> GradePool:
        reward = settings.reward
        return GradePool(
            workers=reward.workers,
            deadline_s=reward.deadline_s,
            allow_fallbacks=reward.allow_fallbacks,
            function=None if reward.function is None else check_function(reward.function),
        )

    def _measure(self, problems: Sequence[Problem]) -> None:
        self._world.first(lambda: self._show(problems))
        for arm in self.recipe.study.arms:
            if not self._is_done(f"eval/{arm}"):
                self._measure_arm(arm, problems)  # whose model goes with it, before the next one is loaded

    def _measure_arm(self, arm: str, problems: Sequence[Problem]) -> None:
        folder, settings = self.folder / "eval" / arm, self.recipe.eval
        started = time.monotonic()
        vlm = self._spread(self._vlm(self._weights_of(arm)))
        chat = loading.make_chat(vlm, self.recipe)
        engine = self._make_engine(vlm, chat, settings.max_rows)
        sampler = EngineSampler(engine, chat, settings.sampling(), batch_size=CHUNK)
        with self._pool(self.recipe.grpo) as pool, self._output.screen(f"eval {arm}", len(problems)) as view:
            evaluator = Evaluator(sampler=sampler, pool=pool, world=self._world)
            evaluate(evaluator, problems, folder=folder, screen=view, stop=self._stop)
        seconds = round(time.monotonic() - started, 1)
        self._world.first(partial(mark_done, folder, seconds=seconds))
        log.info("eval %s: done", arm)

    def _show(self, problems: Sequence[Problem]) -> None:
        pictured = 8 * self.recipe.report.gallery
        ProblemStore(self.folder / "eval", max_pictured=pictured).add(problems)

    def _summary(self) -> dict[str, Any]:
        seconds = {}
        for stage in ("cold_start", *TRAINING_ORDER):
            if is_done(self.folder / stage):
                seconds[stage] = read_json(self.folder / stage / "done.json")["seconds"]
        arms = {}
        for arm in self.recipe.study.arms:
            arms[arm] = read_json(self.folder / "eval" / arm / "scores.json")
            seconds[f"eval_{arm}"] = read_json(self.folder / "eval" / arm / "done.json")["seconds"]
        return {
            "name": self.recipe.name,
            "arms": arms,
            "seconds": seconds,
            "seeds": [self.recipe.seed],
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": versions(),
            "command": command(),
            **({"ranks": self._world.size} if self._world.grouped else {}),
        }


def _counts(demonstrations: Sequence[Demonstration], sources: RunData) -> dict[str, int]:
    """How much data each part of the study had, for the model's card."""
    return {"cold_start": len(demonstrations), "rl": len(sources.rl), "test": len(sources.test)}


@contextmanager
def attempt_log(folder: Path) -> Iterator[None]:
    """Every start of a run has a log of its own, `attempt-N.log`, with warnings and what stopped it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("attempt-*.log")))
    handler = logging.FileHandler(folder / f"attempt-{number}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        log.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _worth_keeping(folder: Path, changed: Iterable[str]) -> bool:
    """Whether earlier starts left a finished stage, a checkpoint or answers that these keys decide.

    A cold start stays good while its data and its teacher are the same.
    """
    again = not any(key.split(".")[0] in ("data", "images", "seed", "teacher") for key in changed)
    return any(
        path.stat().st_size and not (again and "cold_start" in path.relative_to(folder).parts)
        for pattern in _WORK
        for path in folder.rglob(pattern)
    )


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into a new run folder, or check that an old one has the same.

    Arms alone may be added to it; a start that came to nothing (a mistyped model) may be corrected. Raises
    RunFolderError for a folder of another recipe or with foreign content, RecipeError.
    """
    if recipe.grpo.reward.function is not None:
        check_function(recipe.grpo.reward.function)
    path = folder / "recipe.yaml"
    if path.exists():
        before = load_recipe(str(path)).recipe
        changed = differences(before, recipe)
        grows = set(before.study.arms) < set(recipe.study.arms)
        if grows and [key for key, _, _ in changed] == ["study.arms"]:
            atomic_write(path, dump(recipe))
        elif changed and not _worth_keeping(folder, (key for key, _, _ in changed)):
            (folder / "eval" / "problems.jsonl").unlink(missing_ok=True)  # written once, of the data before
            atomic_write(path, dump(recipe))
        elif changed:
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in changed[:5])
            raise RunFolderError(
                f"the folder holds a run of another recipe: {listed}",
                where=str(folder),
                fix="choose another --out, or remove the folder, or run with its own recipe.yaml",
            )
        return
    if folder.exists() and any(path.name != "cold_start" for path in folder.iterdir()):
        raise RunFolderError(
            "the folder is not empty and holds no run", where=str(folder), fix="choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create it: {error.strerror}", where=str(folder)) from error
    atomic_write(path, dump(recipe))


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    return {name: metadata.version(name) for name in ("rlcs", "torch", "transformers")}


def command() -> list[str]:
    """What was typed."""
    return ["rlcs", *sys.argv[1:]]


def run_seeds(
    recipe: Recipe,
    folder: Path,
    count: int,
    *,
    sources: RunData,
    output: Output,
    stop: StopFlag,
    world: World = ALONE,
) -> dict[str, Any]:
    """The study with `count` seeds, each in its own folder; the summary averages over them.

    Seeds share the held-out problems, so the interval of a mean is the Wilson interval of that
    mean over the problems once, not over problems times seeds.
    """
    if count == 1:
        return Study(recipe, folder, sources=sources, output=output, stop=stop, world=world).run()

    def begin() -> None:
        claim(folder, recipe)
        # For whoever must say how a stopped study goes on.
        write_json(folder / "seeds.json", {"count": count})

    world.first(begin)
    summaries = {}
    for seed in range(recipe.seed, recipe.seed + count):
        own = recipe.model_copy(update={"seed": seed})
        study = Study(own, folder / f"seed-{seed}", sources=sources, output=output, stop=stop, world=world)
        summaries[seed] = study.run()
    summary = averaged(recipe, summaries)

    def conclude() -> dict[str, Any]:
        write_json(folder / "summary.json", summary)
        report.build(folder)
        return summary

    return world.first(conclude)


def averaged(recipe: Recipe, summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every arm's accuracy, and each seed's own values."""
    arms = {}
    first = next(iter(summaries.values()))
    for arm in first["arms"]:
        each = [summary["arms"][arm] for summary in summaries.values()]
        accuracy, n = sum(one["accuracy"] for one in each) / len(each), each[0]["n"]
        arms[arm] = {**with_interval(accuracy, n), "n": n}
    stages = first["seconds"]
    return {
        "name": recipe.name,
        "arms": arms,
        "seconds": {s: sum(x["seconds"][s] for x in summaries.values()) for s in stages},
        "seeds": list(summaries),
        "per_seed": {str(seed): summary["arms"] for seed, summary in summaries.items()},
        "recipe": recipe.model_dump(mode="json"),
        "versions": first["versions"],
        "command": command(),
    }
