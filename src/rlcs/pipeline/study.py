"""The study of one seed: the base is measured, then each arm is trained and measured; the report is last.

Every stage writes a marker when it is done. A stopped run resumes at the stage without one: SFT and
GRPO at their newest checkpoint, a measurement after its last answer.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlcs import report
from rlcs.data.problem_store import ProblemStore
from rlcs.data.run_data import RunData
from rlcs.distill.run import load_kept
from rlcs.distributed import ALONE, World
from rlcs.engines.base import Engine
from rlcs.engines.factory import EngineNeeds, MakeEngine, open_engines
from rlcs.engines.local import LocalEngine
from rlcs.errors import out_of_memory_in
from rlcs.evals import CHUNK
from rlcs.evals.arms import Evaluator, evaluate
from rlcs.evals.validation import validate
from rlcs.generation import EngineSampler
from rlcs.grading.reward import Grader
from rlcs.model import loading
from rlcs.model.attention import require_usable
from rlcs.model.chat import Chat
from rlcs.model.fsdp import reference_dtype
from rlcs.model.vlm import Vlm
from rlcs.pipeline import probe
from rlcs.pipeline.blind import answered_blind, blind_summary, blind_tasks
from rlcs.pipeline.data_checks import CHECKS, check_prompts
from rlcs.pipeline.demonstrations import make_demonstrations
from rlcs.pipeline.faults import add_faults
from rlcs.pipeline.graders import open_graders
from rlcs.pipeline.inputs import check_inputs
from rlcs.pipeline.online_teacher import open_teacher
from rlcs.pipeline.preflight import Preflight
from rlcs.pipeline.run_folder import attempt_log, claim, command, recipe_hash, versions
from rlcs.pipeline.shortage import memory_advice
from rlcs.pipeline.space import existing
from rlcs.progress import Output, RowProgress
from rlcs.recipe.arms import ARMS, RL_ARMS, TRAINING_ORDER, RlArm
from rlcs.recipe.coldstart import subset
from rlcs.recipe.schema import Model, Recipe
from rlcs.recipe.stages import Grpo, Stage
from rlcs.records import Demonstration, Problem
from rlcs.signals import StopFlag
from rlcs.storage import is_done, mark_done, read_json, verify_done, write_json
from rlcs.storage.locks import hold
from rlcs.train import grpo, sft
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir
from rlcs.train.validation import AfterValidation, Validation

log = logging.getLogger("rlcs")


class Study:
    """One recipe, one seed, one run folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        data: RunData,
        output: Output,
        stop: StopFlag,
        world: World = ALONE,
        dry: Path | None = None,
    ) -> None:
        """Check that the folder is free for the recipe; a `dry` run has vLLM's files in that folder.

        Raises RunFolderError if it belongs to another recipe, UserError.
        """
        require_usable(recipe.model.attention, world.device or loading.default_device())
        self.recipe = recipe
        self.folder = folder
        self._data = data
        self._output = output
        self._stop = stop
        self._world = world
        self._dry = dry is not None
        self._logs = dry or folder / "rollout"
        self._seen: dict[Path, object] = {}
        self.after_validation: AfterValidation | None = None
        """Gets the rows of the validation of RL."""
        self._make_engine: MakeEngine
        self._claimed = world.first(lambda: claim(folder, recipe, dry=True))
        self._recipe_hash = recipe_hash(recipe)

    def run(self) -> dict[str, Any]:
        """Run every stage that is not done; returns the summary, which is also in summary.json."""
        with self._held():
            return self._run_stages()

    def measure_base(self) -> None:
        """Measure the recipe's model alone; nothing is tried before."""
        with self._held():
            self.check_data()
            with self.engines():
                self._world.first(self._write_problems)
                self._measure("base")

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the folder, and log into it."""
        if self._world.rank:
            log.setLevel(logging.ERROR)  # warnings and the log are rank 0's
        with ExitStack() as stack:
            self._world.first(lambda: stack.enter_context(hold(self.folder)))
            self.claim()
            self._world.first(self._remove_weights)
            log_here = attempt_log(self.folder / "logs") if self._world.rank == 0 else nullcontext()
            with log_here, memory_advice(self.recipe, self._world):
                yield

    def _remove_weights(self) -> None:
        """Remove what a killed attempt left of the weights for vLLM; this one may not need vLLM any more."""
        if not self._dry:
            shutil.rmtree(engine_needs(self.recipe).weights_folder(self._logs), ignore_errors=True)

    def claim(self) -> None:
        """Write the recipe into the folder, in which something may then lie before the run.

        `run` does so itself, under the lock: another process may have been there since the check.
        """
        self._claimed = self._world.first(lambda: claim(self.folder, self.recipe))

    @contextmanager
    def engines(self) -> Iterator[None]:
        """Open the run's engines, which share its vLLM servers."""
        with open_engines(engine_needs(self.recipe), self._logs) as self._make_engine:
            yield

    def check_data(self) -> None:
        """Make the prompts of all data, leave out rows without one, and show what there is to know.

        Raises DataError if these rows are many, RunFolderError if data or model are not those of the folder.
        """
        model = self.recipe.model
        inputs = partial(check_inputs, self.folder, self._data, model.name, revision=model.revision)
        if self._world.grouped:  # a checkpoint's model is written once, by rank 0
            self._world.first(lambda: loading.resolve(model.name))
        revision = self._world.first(lambda: inputs(dry=self._dry))
        model = model.model_copy(update={"revision": revision})
        self.recipe = self.recipe.model_copy(update={"model": model})
        with Output(quiet=True, json=self._output.json).screen("data", 0) as view:
            watch = RowProgress(view, "prompts counted")
            self._data = check_prompts(self._data, self.recipe, watch)
            blind_tasks("base", self.recipe, self._data, self.folder)  # that other images are there
            for line in self._data.notes:
                log.warning(line)
                view.say(line)

    def try_stages(self) -> dict[str, float]:
        """Try what is left of the run in small, with open engines; the seconds of each check.

        Raises RlcsError.
        """
        trial = Preflight(
            self.recipe,
            self.folder,
            data=self._data,
            weights=engine_needs(self.recipe).weights_folder(self._logs),
            make_engine=self._make_engine,
            world=self._world,
            stop=self._stop,
        )
        with Output(quiet=True, json=self._output.json).screen("preflight", 0) as view:
            return trial.run(view)

    def _run_stages(self) -> dict[str, Any]:
        self.check_data()
        data, study = self._data, self.recipe.study
        self._world.first(lambda: write_json(self.folder / CHECKS, data.checks))
        # Each call frees its model before the next one is loaded.
        with self.engines():  # vLLM starts with the preflight, and goes on to measure the base
            self.try_stages()
            self._world.first(self._write_problems)
            self._measure("base")
        self._drop_blind()
        demonstrations: Sequence[Demonstration] = ()
        if study.cold_starts:  # between the engines: SFT and a local teacher have vLLM's memory
            with out_of_memory_in("cold start"):
                self._world.first(self._cold_start)
            demonstrations = self._demonstrations()
            if study.needs_sft:
                with out_of_memory_in("sft"):
                    self._sft(demonstrations)
        with self.engines():
            if self.recipe.sft.handover.rule == "probe":
                with out_of_memory_in("probe"):
                    self._probe(demonstrations)
            for arm in TRAINING_ORDER:
                if arm in study.arms:
                    if rl := next((each for each in RL_ARMS if each == arm), None):
                        with out_of_memory_in(arm):
                            self._grpo(rl, demonstrations)
                    self._measure(arm)
        counts = {"cold_start": len(demonstrations), "rl": len(self._data.rl), "test": len(data.test)}
        return self._world.first(lambda: self._conclude(counts))

    def _demonstrations(self) -> Sequence[Demonstration]:
        """What is learnt of the cold start: all that was kept, or so many."""
        kept = load_kept(self._data.cold_start, self.folder / "cold_start")
        most = self.recipe.data.max_demonstrations
        return kept if most is None else subset(kept, most, self.recipe.seed)

    def repeat(self, arm: RlArm, of: Recipe, *, until: int) -> None:
        """Train one arm of RL alone, from models and checkpoint in the claimed folder, of a run of `of`.

        It ends after the step `until`, and nothing but its metrics is kept.
        """
        self._recipe_hash = recipe_hash(of)
        self._data = check_prompts(self._data, of)
        self._drop_blind()
        demonstrations: Sequence[Demonstration] = ()
        if arm == "mixed":
            demonstrations = self._demonstrations()
        settings = self._settings_of(arm)
        run = self._run_dir(arm, settings)
        run.saves, run.until = False, until
        with self.engines():
            self._learn(run, ARMS[arm].parent, settings, demonstrations)

    def _drop_blind(self) -> None:
        """Leave out the RL problems that the base answered blind, where the recipe says so."""
        if self.recipe.data.rl_blind == "drop" and self._data.rl:
            blind, note = self._world.first(partial(answered_blind, self._data, self.folder))
            self._data = self._data.without({"rl": set(blind)})
            log.info(note)

    def _conclude(self, counts: dict[str, int]) -> dict[str, Any]:
        path = self.folder / "summary.json"
        before = read_json(path)["counts"] if path.exists() else {}
        # Data that only arms of an earlier command need was not read.
        counts = {name: count or before.get(name, 0) for name, count in counts.items()}
        summary = {**self._summary(), "counts": counts}
        write_json(path, summary)
        log.info("report: %s", report.build(self.folder))
        return summary

    def _cold_start(self) -> None:
        make_demonstrations(
            self._data.cold_start,
            self.recipe,
            self.folder / "cold_start",
            output=self._output,
            stop=self._stop,
        )

    def _is_done(self, name: str) -> bool:
        """Whether a stage has finished. Raises CheckpointError where its files are not as it wrote them."""

        def check() -> bool:
            folder = self.folder / name
            if finished := is_done(folder):
                verify_done(folder, self._seen)
            return finished

        return self._world.first(check)

    def _load(self, settings: Model, arm: str | None, *, four_bit: bool = False) -> Vlm:
        """Load a trained model, `sft` or a step `sft@80`; without an arm, and for the base, the recipe's."""
        if arm is not None and arm != "base":
            self._is_done(arm)
            start = str(self.folder / arm / ("" if "@" in arm else "final"))
            settings = settings.model_copy(update={"name": start, "revision": None})
        loading.give_back_memory()  # FSDP's reference cycles hold the previous sharded model
        with out_of_memory_in("loading"):
            return loading.load(settings, world=self._world, four_bit=four_bit)

    def _policy(self, arm: str | None, frozen: Sequence[str]) -> Vlm:
        """Load an arm's model to train it further: `frozen` parts are fixed, adapters added if configured."""
        recipe = self.recipe
        vlm = self._load(recipe.learner, arm, four_bit=recipe.lora.four_bit)
        return loading.prepare(vlm, recipe.lora, frozen, seed=recipe.seed)

    def _spread(self, vlm: Vlm) -> Vlm:
        with out_of_memory_in("loading"):
            return loading.spread(vlm, self.recipe.parallel)

    def _run_dir(self, name: str, settings: Stage, *, folder: Path | None = None) -> RunDir:
        return RunDir(
            folder or self.folder / name,
            name=name,
            seed=self.recipe.seed,
            settings=settings,
            recipe_hash=self._recipe_hash,
            trackers=self.recipe.trackers,
            gap_alarm=self.recipe.rollout.alarm,
        )

    def _sft(self, demonstrations: Sequence[Demonstration]) -> None:
        if self._is_done("sft"):
            return
        self._world.check(self._stop, "before SFT")
        log.info("sft: %d demonstrations", len(demonstrations))
        settings = self.recipe.sft
        vlm = self._spread(self._policy(None, settings.freeze))
        chat = loading.make_chat(vlm, self.recipe.prompt, self.recipe.images)
        run = self._run_dir("sft", settings)
        with ExitStack() as stack:
            if every := self.recipe.validation.sft_every:
                # Not vLLM, which starts with RL: while SFT trains the GPUs are full.
                engine = LocalEngine(vlm, chat, max_rows=self.recipe.eval.max_rows)
                reward, judged = self.recipe.grpo.reward, self.folder / "judge"
                opened = open_graders(reward, self._world, judged, only_correct=True)
                grader, _ = stack.enter_context(opened)
                demonstrations, held = sft.hold_out(demonstrations, self.recipe.validation.demonstrations)
                loss = partial(sft.loss_on, held, vlm, chat, settings)
                run.validation = self._validation(every, engine, chat, grader, loss=loss)
            steps = settings.num_steps(len(demonstrations))
            view = stack.enter_context(self._output.screen("sft", steps))
            sft.train(vlm, chat, demonstrations, settings, run=run, screen=view, stop=self._stop)

    def _probe(self, demonstrations: Sequence[Demonstration]) -> None:
        """Choose the model that SFT hands over by trials of RL, the best of which `_grpo` goes on with."""
        recipe = self.recipe

        def train(step: int, until: int, steps: int) -> None:
            settings = recipe.grpo.of(probe.ARM).model_copy(update={"steps": steps})
            run = self._run_dir(probe.ARM, settings, folder=probe.trial_folder(self.folder, step))
            run.until = until
            self._learn(run, f"sft@{step}", settings, demonstrations)

        probe.probe(self.folder, recipe.sft.handover, steps=recipe.grpo.steps, train=train, world=self._world)

    def _grpo(self, name: RlArm, demonstrations: Sequence[Demonstration]) -> None:
        if self._is_done(name):
            return
        settings = self._settings_of(name)
        self._learn(self._run_dir(name, settings), ARMS[name].parent, settings, demonstrations)

    def _settings_of(self, arm: RlArm) -> Grpo:
        """The settings of an arm of RL; trials that were lost have taken some of its steps."""
        steps = self._world.first(lambda: probe.steps_of(arm, self.recipe, self.folder))
        return self.recipe.grpo.of(arm).model_copy(update={"steps": steps})

    def _learn(
        self, run: RunDir, start: str | None, settings: Grpo, demonstrations: Sequence[Demonstration]
    ) -> None:
        """Train the model `start` by GRPO; a trial is measured when it begins and where it is left."""
        name, recipe, problems = run.name, self.recipe, self._data.rl
        self._world.check(self._stop, f"before {name}")
        log.info("%s: %d problems, from %s", name, len(problems), start)
        vlm = self._policy(start, settings.freeze)
        reference = None
        if settings.kl.active:
            dtype = reference_dtype(recipe.parallel) if self._world.grouped else None
            vlm, reference = grpo.with_reference(vlm, self._spread, dtype=dtype)
        else:
            vlm = self._spread(vlm)
        chat = loading.make_chat(vlm, recipe.prompt, recipe.images, rl=True)
        distils = "distill" in settings.also.ever
        teacher = open_teacher(recipe, vlm, chat, self._spread) if distils else None
        engine = self._make_engine(vlm, chat, settings.max_rows)
        opened = open_graders(recipe.grpo.reward, self._world, self.folder / "judge")
        with opened as (grader, judge), self._output.screen(name, settings.steps) as view:
            context = GrpoContext(
                vlm=vlm,
                reference=reference,
                chat=chat,
                engine=engine,
                grader=grader,
                judge=judge,
                importance_cap=recipe.rollout.cap,
                overlap=recipe.overlap,
                feature_bytes=int(recipe.images.features_gb * 2**30),
                checks=recipe.rollout.checks,
                drafts=recipe.rollout.engine == "local",
                demonstrations=demonstrations,
                turns=recipe.sft.turns,
                teacher=teacher,
            )
            left_early = run.until is not None and run.saves
            every, at = recipe.validation.grpo_every, (0, run.until or 0) if left_early else ()
            if every or at:
                run.validation = self._validation(every, engine, chat, grader.deciding, at=at)
                run.validation.after = None if at else self.after_validation
            grpo.train(context, problems, settings, run=run, screen=view, stop=self._stop)
            engine.rest()  # after the last validation, too

    def _validation(
        self,
        every: int,
        engine: Engine,
        chat: Chat,
        grader: Grader,
        *,
        at: Collection[int] = (),
        loss: Callable[[], float | None] = lambda: None,
    ) -> Validation:
        """Measure a model that trains, every so many steps, by the engine and the prompts of its stage."""
        settings, problems = self.recipe.validation, self._data.validation
        sampling = settings.sampling(max_new_tokens=self.recipe.eval.max_new_tokens, seed=self.recipe.seed)
        sampler = EngineSampler(engine, chat, sampling, batch_size=CHUNK)
        evaluator = Evaluator(sampler=sampler, grader=grader, world=self._world)

        def measure(stop: StopFlag) -> dict[str, Any]:
            engine.sync()
            return {**validate(evaluator, problems, samples=settings.samples, stop=stop), "loss": loss()}

        return Validation(every=every, measure=measure, at=at)

    def _measure(self, arm: str) -> None:
        """Answer and grade the test problems, and what else the arm's model answers."""
        tasks: dict[Path, Sequence[Problem]] = {self.folder / "eval" / arm: self._data.test}
        tasks |= blind_tasks(arm, self.recipe, self._data, self.folder)
        named = {str(folder.relative_to(self.folder)): problems for folder, problems in tasks.items()}
        if left := {name: problems for name, problems in named.items() if not self._is_done(name)}:
            with out_of_memory_in(f"eval {arm}"):
                self._sample_and_grade(arm, left)

    def _sample_and_grade(self, arm: str, tasks: Mapping[str, Sequence[Problem]]) -> None:
        recipe = self.recipe
        started = time.monotonic()
        vlm = self._spread(self._load(recipe.model, arm))
        chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
        engine = self._make_engine(vlm, chat, recipe.eval.max_rows)
        sampler = EngineSampler(engine, chat, recipe.eval.sampling(), batch_size=CHUNK)
        opened = open_graders(recipe.grpo.reward, self._world, self.folder / "judge", only_correct=True)
        with opened as (grader, _):
            evaluator = Evaluator(sampler=sampler, grader=grader, world=self._world)
            for name, problems in tasks.items():
                title, folder = name.replace("/", " "), self.folder / name
                with self._output.screen(title, len(problems)) as view:
                    evaluate(evaluator, problems, folder=folder, screen=view, stop=self._stop)
                if (judge := recipe.grpo.reward.judge).faults and folder == self.folder / "eval" / arm:
                    replies = self.folder / "judge" / "faults"
                    self._world.first(partial(add_faults, folder, problems, judge, replies))
                seconds = round(time.monotonic() - started, 1)
                reads = ["predictions.jsonl", "scores.json"]
                self._world.first(partial(mark_done, folder, reads=reads, seconds=seconds))
                started = time.monotonic()
                log.info("%s: done", title)
        engine.rest()  # the next stage has the GPU

    def _write_problems(self) -> None:
        """Write the held-out problems for the report."""
        pictured = 8 * self.recipe.report.gallery
        ProblemStore(self.folder / "eval", max_pictured=pictured).add(self._data.test)

    def _summary(self) -> dict[str, Any]:
        seconds = {}
        for stage in ("cold_start", *TRAINING_ORDER):
            if is_done(self.folder / stage):
                seconds[stage] = read_json(self.folder / stage / "done.json")["seconds"]
        arms = {}
        for arm in [arm for arm in self._claimed.study.arms if is_done(self.folder / "eval" / arm)]:
            arms[arm] = read_json(self.folder / "eval" / arm / "scores.json")
            seconds[f"eval_{arm}"] = read_json(self.folder / "eval" / arm / "done.json")["seconds"]
        blind = blind_summary(arms, self._data.test, self.folder)
        return {
            "name": self.recipe.name,
            "arms": arms,
            **({} if blind is None else {"blind": blind}),
            "seconds": seconds,
            "seeds": [self.recipe.seed],
            "recipe": self._claimed.model_dump(mode="json"),
            "versions": versions(),
            "command": command(),
            **({"ranks": self._world.size} if self._world.grouped else {}),
        }


def dry_run(
    recipe: Recipe, folder: Path, *, data: RunData, output: Output, stop: StopFlag, world: World = ALONE
) -> dict[str, float]:
    """Try everything that a run would do, in small; writes nothing, and returns the seconds of each check."""
    with TemporaryDirectory(dir=existing(folder), prefix=".preflight-") as logs:
        study = Study(recipe, folder, data=data, output=output, stop=stop, world=world, dry=Path(logs))
        study.check_data()
        with study.engines():
            return study.try_stages()


def engine_needs(recipe: Recipe) -> EngineNeeds:
    """Derive what the engines of a run must hold: its longest prompt with its longest answer fits."""
    grpo = recipe.grpo
    return EngineNeeds(
        settings=recipe.rollout,
        max_tokens=recipe.prompt.max_tokens + max(grpo.max_new_tokens, recipe.eval.max_new_tokens),
        max_rows=max(grpo.max_rows, grpo.group_size),
        compute_dtype=recipe.parallel.compute_dtype,
        adapter_rank=recipe.lora.rank if recipe.samples_by_adapters else 0,
        name=recipe.name,
    )
