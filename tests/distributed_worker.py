"""One rank of the tests of many processes: `python distributed_worker.py JOB.json`.

A job names a model, a folder and what to do there; the ranks come from the environment, as torchrun
sets it, and without it this is the run of one process that the others are compared with.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from conftest import LengthGrader, Stopper
from rlcs.data import puzzles
from rlcs.distributed import World, join_world
from rlcs.engines.base import Engine
from rlcs.engines.factory import EngineNeeds, MakeEngine, open_engines
from rlcs.engines.local import LocalEngine
from rlcs.evals.arms import Evaluator
from rlcs.evals.validation import validate
from rlcs.generation import EngineSampler
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.fsdp import reference_dtype, whole_weights
from rlcs.model.vlm import Vlm
from rlcs.progress import screen
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Recipe
from rlcs.recipe.stages import Grpo, Sft
from rlcs.records import Demonstration, Problem, Sampling
from rlcs.signals import StopFlag, Stopped
from rlcs.train import grpo, sft
from rlcs.train.context import GrpoContext
from rlcs.train.local_teacher import LocalTeacher
from rlcs.train.run_dir import RunDir
from rlcs.train.validation import Measure, Validation


def mixed_problems(count: int) -> list[Problem]:
    """Every third without an image, so that ranks get packs with and without."""
    problems = list(puzzles.load("puzzles", split="train", count=count, seed=5))
    for i in range(0, count, 3):
        question = "How much is 2 + 2? " * (1 + i % 4)
        problems[i] = Problem(id=f"text{i}", source="t", question=question, answer="4")
    return problems


def demonstrations(count: int) -> list[Demonstration]:
    return [
        Demonstration(problem=p, response=f"two and two: \\boxed{{{p.answer}}} " * (1 + i % 3), teacher="t")
        for i, p in enumerate(mixed_problems(count))
    ]


def load(job: dict, world: World) -> Vlm:
    checkpointing = job.get("gradient_checkpointing", False)
    more = {"gradient_checkpointing": checkpointing, "dtype": job.get("dtype", "auto")}
    settings = Recipe(model={"name": job["model"], **more}).model
    return loading.load(settings, world=world)


def measured(vlm: Vlm, chat: Chat, world: World) -> Measure:
    sampling = Sampling(n=2, temperature=1.0, max_new_tokens=8)
    sampler = EngineSampler(LocalEngine(vlm, chat, max_rows=8), chat, sampling, batch_size=64)
    evaluator = Evaluator(sampler=sampler, grader=LengthGrader(), world=world)
    return lambda stop: validate(evaluator, mixed_problems(7), samples=2, stop=stop)


def engine_needs(job: dict) -> EngineNeeds:
    settings = Rollouts(engine="vllm_server", **job["rollout"])
    return EngineNeeds(settings=settings, max_tokens=512, max_rows=64)


@contextmanager
def opened_engine(job: dict, vlm: Vlm, chat: Chat, shared: MakeEngine | None) -> Iterator[Engine]:
    """The local engine, or one over servers with the settings `rollout`, which behave as `behaviour` says.

    With `shared` servers over those.
    """
    if shared is not None or "rollout" not in job:
        yield shared(vlm, chat, 8) if shared else LocalEngine(vlm, chat, max_rows=8)
        return
    folder = Path(job["folder"]) / "rollout"
    folder.mkdir(exist_ok=True)
    behaviour = job["behaviour"] | {"placeholder": chat.image_id}
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    with open_engines(engine_needs(job), folder) as make:
        yield make(vlm, chat, 8)


@contextmanager
def gradients(job: dict, vlm: Vlm, folder: Path) -> Iterator[None]:
    """Keep the gradient of every optimiser step, where the job says so."""
    kept, step = [], torch.optim.AdamW.step

    def keep(*args, **options):
        grads = [p.grad.detach() for _, p in vlm.parameters() if p.grad is not None]
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        kept.append(torch.cat([grad.flatten() for grad in whole]))
        return step(*args, **options)

    if not job.get("keep_gradients"):
        yield
        return
    torch.optim.AdamW.step = keep
    try:
        yield
    finally:
        torch.optim.AdamW.step = step
    if vlm.world.rank == 0:
        torch.save(kept, folder / "gradients.pt")


def train(job: dict, world: World, shared: MakeEngine | None = None) -> None:
    folder = Path(job["folder"])
    parallel = Parallel(**job.get("parallel", {}))
    settings = Sft(**job["sft"]) if "sft" in job else Grpo(**job["grpo"])
    vlm = load(job, world)
    vlm = loading.prepare(vlm, Lora(**job.get("lora", {})), settings.freeze, seed=3)

    def spread(vlm: Vlm) -> Vlm:
        return loading.spread(vlm, parallel)

    reference = None
    if "grpo" in job and settings.kl.active:
        dtype = reference_dtype(parallel) if world.grouped else None
        vlm, reference = grpo.with_reference(vlm, spread, dtype=dtype)
    else:
        vlm = spread(vlm)
    chat = loading.make_chat(vlm)
    teacher = None
    if "grpo" in job and "distill" in settings.also.ever:
        teacher = LocalTeacher(vlm=spread(load(job | {"model": job["teacher"]}, world)))
    stage = RunDir(folder, name="stage", seed=3, settings=settings, recipe_hash="h")
    if every := job.get("validate"):
        stage.validation = Validation(every=every, measure=measured(vlm, chat, world))
    with StopFlag() as stop, screen("stage", 6, quiet=True, stream=Path(os.devnull).open("w")) as view:
        if job.get("stop_at") and world.rank == world.size - 1:
            view = Stopper(view, stop, job["stop_at"])
        if job.get("run_out_of_memory") and world.rank == world.size - 1:
            torch.optim.AdamW.step = lambda *args, **options: torch.empty(1 << 50)
        if "sft" in job:
            sft.train(vlm, chat, demonstrations(12), settings, run=stage, screen=view, stop=stop)
        else:
            if "stop_after_s" in job and world.rank == world.size - 1:
                timer = threading.Timer(job["stop_after_s"], lambda: setattr(stop, "is_set", True))
                timer.start()
            with opened_engine(job, vlm, chat, shared) as engine, gradients(job, vlm, folder):
                context = GrpoContext(
                    vlm=vlm,
                    reference=reference,
                    chat=chat,
                    engine=engine,
                    grader=LengthGrader(),
                    importance_cap=job.get("cap"),
                    overlap=job.get("overlap", "none"),
                    feature_bytes=job.get("feature_bytes", 1 << 30),
                    checks=job.get("checks", 0),
                    drafts=True,
                    demonstrations=demonstrations(10),
                    teacher=teacher,
                )
                problems = mixed_problems(job.get("problems", 9))
                grpo.train(context, problems, settings, run=stage, screen=view, stop=stop)
    weights = whole_weights(vlm.model, world)
    if world.rank == 0:
        torch.save(weights, folder / "weights.pt")


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    size = jobs[0].get("parallel", {}).get("shard_size")
    with (
        join_world(timeout_s=jobs[0].get("timeout_s", 240), shard_size=size) as world,
        ExitStack() as servers,
    ):
        shared = None
        if folder := jobs[0].get("share_servers"):
            shared = servers.enter_context(open_engines(engine_needs(jobs[0]), Path(folder)))
        for job in jobs:
            Path(job["folder"]).mkdir(parents=True, exist_ok=True)
            try:
                train(job, world, shared)
            except Stopped as error:
                (Path(job["folder"]) / f"stopped-{world.rank}").write_text(str(error))


if __name__ == "__main__":
    main()
