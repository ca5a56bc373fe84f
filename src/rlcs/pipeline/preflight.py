"""Tries every later stage of a run in small before its first training step, so that it fails at once.

Only what is still to come is tried. Nothing is written into the run's stages, and random generators are left
as they were: results do not depend on the trial.
"""

import resource
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from rlcs.cores import usable_cores
from rlcs.data.run_data import RunData
from rlcs.data.stored import all_answered, with_most_pixels
from rlcs.distill.teachers import open_teacher
from rlcs.distributed import ALONE, World, visible_gpus
from rlcs.engines.factory import MakeEngine
from rlcs.engines.vllm import readiness
from rlcs.errors import DataError, EndpointError, RlcsError, RunFolderError, UserError, out_of_memory_in
from rlcs.grading.reward import try_reward
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.pipeline.faults import try_fault_judge
from rlcs.pipeline.graders import open_graders
from rlcs.pipeline.online_teacher import try_teacher
from rlcs.pipeline.probe import ARM
from rlcs.pipeline.run_folder import command
from rlcs.pipeline.space import StageSpace, existing, require_space, stage_space, trials_space
from rlcs.progress import Screen
from rlcs.recipe.arms import RL_ARMS, TRAINING_ORDER, stages_behind
from rlcs.recipe.sampling import EngineSettings
from rlcs.recipe.schema import Model, Recipe
from rlcs.records import Problem, Prompt, Request, Sample
from rlcs.signals import StopFlag
from rlcs.storage import is_done
from rlcs.train.state import capture_rng, restore_rng
from rlcs.train.trackers import try_trackers

IMAGE_PROBLEMS = 8
"""Problems with the largest images, of which one is answered: not all need fit."""
TRIAL_TOKENS = 16
"""Longest answer of a trial, unless it is a full one."""
_TEACHER_PROBLEMS = 3
_TRIAL_TIMEOUT_S = 120.0
_BASE_FILES = 256
"""Open files of a run beside connections and grader processes: libraries, data, logs."""

Work = Callable[[], Sequence[str]]
"""One check: returns remarks, raises RlcsError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remaining:
    """The stages of a run that are not done: folders to train, arms to measure, demonstrations to make."""

    train: tuple[str, ...]
    measure: tuple[str, ...]
    asks_teacher: bool

    @property
    def rl(self) -> bool:
        """Whether RL is to come."""
        return any(arm in RL_ARMS for arm in self.train)

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, data: RunData) -> "Remaining":
        """What the run in a folder has left to do."""
        needed = {stage for arm in recipe.study.arms for stage in stages_behind(arm)}
        missing = not all_answered(data.cold_start)
        return cls(
            train=tuple(s for s in TRAINING_ORDER if s in needed and not is_done(folder / s)),
            measure=tuple(a for a in recipe.study.arms if not is_done(folder / "eval" / a)),
            asks_teacher="cold_start" in needed and missing and not is_done(folder / "cold_start"),
        )


class Preflight:
    """The trial of one run; under `torchrun` all ranks make it together."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        data: RunData,
        weights: Path,
        make_engine: MakeEngine,
        world: World,
        stop: StopFlag,
    ) -> None:
        """Nothing is tried yet; `make_engine` is of the run, `weights` the folder of its engines' weights."""
        self.recipe, self.folder = recipe, folder
        self._data, self._weights, self._make_engine = data, weights, make_engine
        self._world, self._stop = world, stop
        self._remaining = world.first(lambda: Remaining.of(recipe, folder, data))

    def run(self, view: Screen) -> dict[str, float]:
        """Make every check, a line for each; returns their seconds.

        Raises the RlcsError of the first that fails.
        """
        seconds: dict[str, float] = {}
        generators = capture_rng()
        try:
            for name, work in self._checks().items():
                self._world.check(self._stop, "preflight")
                started = time.monotonic()
                try:
                    with out_of_memory_in(f"preflight, {name}"):
                        remarks = work()
                except RlcsError:
                    view.say(f"preflight: {name:<14}  failed")
                    raise
                seconds[name] = round(time.monotonic() - started, 2)
                view.say(f"preflight: {name:<14}  ok  {seconds[name]:5.1f} s")
                for remark in remarks:
                    view.say(f"  {remark}")
        finally:
            restore_rng(generators)
        return seconds

    def _checks(self) -> Mapping[str, Work]:
        remaining, mode = self._remaining, self.recipe.study.preflight
        if mode == "off" or not (remaining.train or remaining.measure):
            return {}
        checks: dict[str, Work] = {
            "GPUs": self._gpus,
            "folders": self._first(self._folders),
            "open files": self._open_files,
            "model, disk": self._first(self._model_and_disk),
            "reward": self._first(self._reward),
        }
        if self.recipe.grpo.reward.judge.faults:
            checks["judge of faults"] = self._first(self._fault_judge)
        if remaining.asks_teacher:
            checks["teacher"] = self._first(self._teacher)
        if remaining.train and any(self.recipe.trackers.model_dump().values()):
            checks["trackers"] = self._first(self._trackers)
        if self.recipe.rollout.engine != "local":
            checks["vLLM"] = self._first(self._vllm)
        checks["rollout engine"] = lambda: self._engine(full=mode == "full")
        return checks

    @property
    def _distils(self) -> bool:
        """Whether an arm that is still to be trained has a teacher of its answers."""
        also, arms = self.recipe.grpo.also, self._remaining.train
        return any("distill" in also.of(arm).ever for arm in RL_ARMS if arm in arms)

    def _first(self, work: Work) -> Work:
        """The work on rank 0 alone."""
        return lambda: self._world.first(work)

    # --- machine ------------------------------------------------------------------------------------

    def _gpus(self) -> Sequence[str]:
        device = self._world.device or loading.default_device()
        visible = visible_gpus()
        own = visible[device.index or 0] if device.type == "cuda" else ""
        places = self._world.gather((socket.gethostname(), own))
        training = [gpu for host, gpu in places if gpu and host == places[0][0]]

        def check() -> Sequence[str]:
            words = shlex.join(command()[1:])
            rollout = self.recipe.rollout
            readiness.require_own_gpus(rollout, training=training, visible=visible, command=words)
            if not self._world.grouped:
                loading.require_unsharded(self.recipe.parallel)
            return ()

        return self._world.first(check)

    def _folders(self) -> Sequence[str]:
        weights = self.recipe.rollout.weights_folder
        for path in (self.folder, *([Path(weights)] if weights else [])):
            place = existing(path)
            try:
                with tempfile.TemporaryFile(dir=place) as file:
                    file.write(b"test")
                    file.flush()
            except OSError as error:
                fix = "choose a folder in which you may write: --out, or rollout.weights_folder"
                raise RunFolderError(
                    f"cannot write there: {error.strerror}", where=str(place), fix=fix
                ) from error
        return ()

    def _open_files(self) -> Sequence[str]:
        """Raise the soft limit of this process as far as the run needs it."""
        recipe, needed = self.recipe, _BASE_FILES
        if recipe.rollout.engine != "local":
            needed += recipe.rollout.concurrency * (len(recipe.rollout.urls) or recipe.rollout.servers)
        needed += recipe.teacher.concurrency if self._remaining.asks_teacher else 0
        needed += recipe.grpo.reward.judge.concurrency if "judge" in recipe.grpo.reward.weights else 0
        needed += 4 * (recipe.grpo.reward.workers or usable_cores()) * len(recipe.grpo.reward.weights)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return ()
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"a process may open {hard:,} files here, and the run needs {needed:,}",
                where="ulimit -n",
                fix="raise it, or lower rollout.concurrency, teacher.concurrency or grpo.reward.workers",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return [f"the limit on open files is raised from {soft:,} to {needed:,}"]

    # --- model, data, graders -----------------------------------------------------------------------

    def _model_and_disk(self) -> Sequence[str]:
        """Prepare the structure of the model for each stage, and compare the space that it takes."""
        recipe, stages = self.recipe, dict[str, StageSpace]()
        demonstrations = len(self._data.cold_start) * max(1, recipe.teacher.max_kept)
        for name in self._remaining.train:
            settings = recipe.sft if name == "sft" else recipe.grpo
            steps = recipe.sft.num_steps(demonstrations) if name == "sft" else recipe.grpo.steps
            vlm = loading.load(recipe.learner, weights=False)
            vlm = loading.prepare(vlm, recipe.lora, settings.freeze, seed=recipe.seed)
            if not any(parameter.requires_grad for parameter in vlm.model.parameters()):
                key = f"{'sft' if name == 'sft' else 'grpo'}.freeze"
                raise UserError(
                    "no part of the model is left to train", where=key, fix="take a part out of it"
                )
            stages[name] = stage_space(vlm, settings, steps=steps)
        if recipe.sft.handover.rule == "probe" and ARM in stages:
            stages["trial-*"] = trials_space(stages[ARM], recipe.grpo, recipe.sft.handover)
        weights = None if recipe.rollout.engine == "local" else self._weights
        return [require_space(self.folder, stages, weights=weights)] if stages else []

    def _reward(self) -> Sequence[str]:
        """Call the parts of the reward that are still needed: a mistake in it must not wait for RL."""
        reward, rl = self.recipe.grpo.reward, self._remaining.rl
        with (
            TemporaryDirectory() as replies,
            open_graders(reward, ALONE, Path(replies), only_correct=not rl, trial=True) as (grader, _),
        ):
            warnings = try_reward(grader, (self._data.rl if rl else self._data.test)[0])
        return [f"warning: {warning}" for warning in warnings]

    def _fault_judge(self) -> Sequence[str]:
        with TemporaryDirectory() as replies:
            return try_fault_judge(self._data.test[0], self.recipe.grpo.reward.judge, Path(replies))

    def _teacher(self) -> Sequence[str]:
        """Ask for one short answer, or for another where the teacher refuses that problem."""
        teacher = self.recipe.teacher
        if teacher.who == "local":
            loading.load(Model(name=str(teacher.model)), weights=False)
            return self._startable(teacher.rollout, "teacher.rollout")
        unanswered = (row.problem for row in self._data.cold_start if row.response is None)
        problems = list(islice(unanswered, _TEACHER_PROBLEMS))
        brief = {
            "max_tokens": min(teacher.max_tokens, TRIAL_TOKENS),
            "max_retries": min(teacher.max_retries, 1),
            "concurrency": 1,  # a second problem is asked about only where the first is refused
            "request_timeout_s": min(teacher.request_timeout_s, _TRIAL_TIMEOUT_S),
        }
        short = teacher.model_copy(update=brief)
        samples: list[Sample] = []
        known = {problem.id: problem for problem in problems}
        with (
            TemporaryDirectory() as logs,
            open_teacher(short, known, self.recipe.images, seed=self.recipe.seed, logs=Path(logs)) as sampler,
        ):
            for problem in problems:
                samples += sampler.samples([Request.of(problem)], stop=self._stop)
                if self._stop.is_set or not samples[-1].error:
                    return ()
                if samples[-1].retryable:
                    return [f"warning: the teacher does not answer now: {samples[-1].error}"]
        raise EndpointError(
            f"the teacher answers none of {len(problems)} problems: {samples[-1].error}",
            where=teacher.base_url or "teacher",
            fix="see the log of its server; a text model cannot be asked about images",
        )

    def _trackers(self) -> Sequence[str]:
        with TemporaryDirectory() as folder:
            try_trackers(self.recipe.trackers, Path(folder) / self.folder.absolute().name / "preflight")
        return ()

    # --- the engine -----------------------------------------------------------------------------------

    def _vllm(self) -> Sequence[str]:
        rollout = self.recipe.rollout
        device = self._world.device or loading.default_device()
        readiness.require_quantisable(rollout, device.type)
        if rollout.urls:
            readiness.require_reachable(rollout)
            return ()
        return self._startable(rollout, "rollout")

    def _startable(self, settings: EngineSettings, section: str) -> Sequence[str]:
        if settings.engine == "local":
            return ()
        return [f"vLLM {readiness.require_startable(settings, section)}"]

    def _engine(self, *, full: bool) -> Sequence[str]:
        """Load the model, start the engine, and answer the problem with the largest image.

        Where every rank starts a vLLM of its own, every rank asks. vLLM then gets the weights a second
        time, as after a step of RL: what cannot be sent to it, or not be loaded, is known before any
        training. A full trial allows the longest answer.
        """
        recipe, rl = self.recipe, self._remaining.rl
        longest = max(recipe.grpo.max_new_tokens if rl else 0, recipe.eval.max_new_tokens)
        loading.give_back_memory()
        model = recipe.learner if rl else recipe.model
        vlm = loading.load(model, world=self._world, four_bit=rl and recipe.lora.four_bit)
        if rl:
            vlm = loading.prepare(vlm, recipe.lora, recipe.grpo.freeze, seed=recipe.seed)
        vlm = loading.spread(vlm, recipe.parallel)
        chat: Chat = loading.make_chat(vlm, recipe.prompt, recipe.images, rl=rl)
        if rl and self._distils:
            prompt = largest_prompt(chat, self._data.rl)
            self._world.first(lambda: try_teacher(recipe, vlm, chat, prompt))
        sampling = chat.sampling(
            n=1, temperature=0.0, max_new_tokens=longest if full else min(longest, TRIAL_TOKENS), seed=0
        )
        problems = self._data.rl if rl else self._data.test
        asks = self._world.rank == 0 or recipe.rollout.engine == "vllm_colocated"
        prompts = [largest_prompt(chat, problems)] if asks else []
        engine = self._make_engine(vlm, chat, 1)
        for _ in range(1 if recipe.rollout.engine == "local" else 2):
            engine.sync()
            engine.sample(prompts, sampling)
        return ()


def largest_prompt(chat: Chat, problems: Sequence[Problem]) -> Prompt:
    """The prompt of the problem with the largest image, of those that fit. Raises DataError if none does."""
    error = DataError("there are no problems", fix="check the data source")
    for problem in with_most_pixels(problems, IMAGE_PROBLEMS):
        [prompt] = chat.prompts([problem])
        if isinstance(prompt, Prompt):
            return prompt
        error = prompt
    raise error
