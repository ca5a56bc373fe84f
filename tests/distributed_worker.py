"""One rank of the tests of many processes: `python distributed_worker.py JOB.json`.

A job names a model, a folder and what to do there; the ranks come from the environment, as torchrun
sets it, and without it this is the run of one process that the others are compared with.
"""

import json
import os
import sys
from pathlib import Path

import torch

from conftest import LengthGrader, Stopper
from rlcs.data import puzzles
from rlcs.distributed import World, join_world
from rlcs.engines.local import LocalEngine
from rlcs.evals.arms import Evaluator
from rlcs.evals.validation import validate
from rlcs.generation import EngineSampler
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.fsdp import whole_weights
from rlcs.model.vlm import Vlm
from rlcs.progress import screen
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.schema import Recipe
from rlcs.recipe.stages import Grpo, Sft
from rlcs.records import Demonstration, Problem, Sampling
from rlcs.signals import StopFlag, Stopped
from rlcs.train import grpo, sft
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


def train(job: dict, world: World) -> None:
    folder = Path(job["folder"])
    parallel = Parallel(**job.get("parallel", {}))
    settings = Sft(**job["sft"]) if "sft" in job else Grpo(**job["grpo"])
    vlm = load(job, world)
    vlm = loading.prepare(vlm, Lora(**job.get("lora", {})), settings.freeze, seed=3)

    def spread(vlm: Vlm) -> Vlm:
        return loading.spread(vlm, parallel)

    reference = None
    if "grpo" in job and settings.kl.active:
        vlm, reference = grpo.with_reference(vlm, spread)
    else:
        vlm = spread(vlm)
    chat = loading.make_chat(vlm)
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
            context = grpo.GrpoContext(
                vlm=vlm,
                reference=reference,
                chat=chat,
                engine=LocalEngine(vlm, chat, max_rows=8),
                grader=LengthGrader(),
            )
            grpo.train(context, mixed_problems(9), settings, run=stage, screen=view, stop=stop)
    weights = whole_weights(vlm.model, world)
    if world.rank == 0:
        torch.save(weights, folder / "weights.pt")


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    size = jobs[0].get("parallel", {}).get("shard_size")
    with join_world(timeout_s=jobs[0].get("timeout_s", 240), shard_size=size) as world:
        for job in jobs:
            Path(job["folder"]).mkdir(parents=True, exist_ok=True)
            try:
                train(job, world)
            except Stopped as error:
                (Path(job["folder"]) / f"stopped-{world.rank}").write_text(str(error))


if __name__ == "__main__":
    main()
