"""Checks steps of GRPO as a run takes them: rollouts, grades, reference, update, checkpoint, final model.

The model is random, with real layers, and the problems are the built-in puzzles. Seconds are those of the
last step, as the first one compiles kernels and starts vLLM.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlcs.data.sources import open_builtin
from rlcs.distributed import ALONE, World, join_world
from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import peak_speed
from rlcs.doctor.gpu.models import Shape, configuration, random_vlm, shapes
from rlcs.doctor.gpu.vllm import rollouts
from rlcs.engines.factory import open_engines
from rlcs.model import loading
from rlcs.model.fsdp import reference_dtype
from rlcs.pipeline.graders import open_graders
from rlcs.pipeline.study import engine_needs
from rlcs.plan.skeleton import measure
from rlcs.progress import screen
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.signals import StopFlag
from rlcs.storage import DONE, read_jsonl
from rlcs.train import grpo
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir

_LARGEST_GAP = 0.1
"""Mean difference of the sampler's and the policy's logprobs, in nats, as in `rollout.alarm`."""
_REWARD = "reward.py"
_ODD = "def odd(problem, response):\n    return float(len(response) % 2)\n"


def check(setting: Setting) -> Check:
    """Train for two steps, then read what the run wrote."""
    folder = Path(setting.folder) / "step"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # as a run without torchrun
    with nullcontext(ALONE) if alone else join_world(timeout_s=300) as world:
        shape = _shape(setting)
        device = world.device or (torch.device("cpu") if setting.cpu else loading.default_device())
        world.first(lambda: _write_files(shape, folder, device))
        recipe = _recipe(setting, folder, world)
        _train(recipe, folder, world)
        reports = world.first(lambda: read_jsonl(folder / "run" / "metrics.jsonl"))
    last = reports[-1]
    values = {
        "engine": recipe.rollout.engine,
        "ranks": world.size,
        "model": shape.label,
        "layers": shape.layers,
    }
    values |= {"first_step_s": sum(reports[0]["seconds"].values()), "seconds": last["seconds"]}
    values |= {name: last[name] for name in ("tokens", "sampler_gap", "loss", "grad_norm") if name in last}
    update = last["seconds"]["update"] + last["seconds"].get("reference", 0.0)
    values["tokens_per_s_per_gpu"] = last["tokens"] / sum(last["seconds"].values()) / world.size
    peak = peak_speed(device)
    if peak is not None:
        sizes = measure(shape.name, configuration(shape))
        # The reference is one forward pass, the update two (adapters) or three; attention is left out.
        passes = 1 + (2 if recipe.lora.rank else 3)
        operations = 2 * passes * sizes.parameters["language_model"] * last["tokens"]
        values["model_flops_share"] = operations / update / world.size / peak
    problems = _problems(last, folder / "run")
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in last["seconds"].items())
    share = f", {values['model_flops_share']:.1%} of peak in the update" if peak else ""
    message = (
        f"{recipe.rollout.engine}: {seconds} s; {values['tokens_per_s_per_gpu']:,.0f} tokens/s a GPU{share}"
    )
    fix = (
        "set rollout.engine=local or model.attention=dense to find the part; and report it"
        if problems
        else ""
    )
    return Check(ok=not problems, message="; ".join(problems) or message, fix=fix, values=values)


def _shape(setting: Setting) -> Shape:
    shape = shapes(setting)[0]
    return shape if setting.cpu else replace(shape, layers=4)


def _recipe(setting: Setting, folder: Path, world: World) -> Recipe:
    """A small step with every phase: a reference, several groups for each rank, rewards that differ.

    One GPU trains adapters, several all weights, as the recipes do.
    """
    words = [
        f"model.name={folder / 'model'}",
        "grpo.reward.accuracy=0",
        f"grpo.reward.functions={{{folder / _REWARD}:odd: 1}}",
        "grpo.steps=2",
        "grpo.optimizer_steps=1",
        "grpo.kl.kind=k3",
        "grpo.kl.coefficient=0.01",
        "grpo.save_every=1",
        "grpo.optimizer.lr=1e-6",
    ]
    if setting.cpu:
        words += [f"grpo.prompts_per_step={2 * world.size}", "grpo.group_size=4", "grpo.max_new_tokens=16"]
    else:
        words += [f"grpo.prompts_per_step={8 * world.size}", "grpo.group_size=5", "grpo.max_new_tokens=256"]
        words += ["prompt.max_tokens=2048", "images.rl_min_pixels=262144", "grpo.pack_tokens=16384"]
        words += ["parallel.compute_dtype=bfloat16"] if world.grouped else ["model.dtype=bfloat16"]
    words += [] if world.grouped else ["lora.rank=16", "lora.alpha=16", "grpo.optimizer.lr=1e-4"]
    recipe = load_recipe("quickstart", words).recipe
    settings = rollouts(setting)
    return recipe if settings is None else recipe.model_copy(update={"rollout": settings})


def _write_files(shape: Shape, folder: Path, device: torch.device) -> None:
    """Write the model, and a reward that differs among random answers, all of which are wrong."""
    loading.save(random_vlm(shape, device, torch.float32), folder / "model")
    loading.give_back_memory()
    (folder / _REWARD).write_text(_ODD, encoding="utf-8")


def _train(recipe: Recipe, folder: Path, world: World) -> None:
    """As `pipeline.study` does it."""
    settings = recipe.grpo
    problems = open_builtin("builtin:puzzles?count=64&seed=2", "rl")
    vlm = loading.prepare(loading.load(recipe.learner, world=world), recipe.lora, settings.freeze, seed=0)
    dtype = reference_dtype(recipe.parallel) if world.grouped else None
    vlm, reference = grpo.with_reference(
        vlm, lambda whole: loading.spread(whole, recipe.parallel), dtype=dtype
    )
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images, rl=True)
    run = RunDir(folder / "run", name="grpo", seed=0, settings=settings, recipe_hash="doctor")
    with (
        open_engines(engine_needs(recipe), folder / "rollout") as make,
        open_graders(settings.reward, world, folder / "judge") as (grader, judge),
        StopFlag() as stop,
        screen("grpo", settings.steps, quiet=True, stream=sys.stderr) as view,
    ):
        context = GrpoContext(
            vlm=vlm,
            reference=reference,
            chat=chat,
            engine=make(vlm, chat, settings.max_rows),
            grader=grader,
            judge=judge,
            importance_cap=recipe.rollout.cap,
            overlap=recipe.overlap,
            feature_bytes=int(recipe.images.features_gb * 2**30),
            checks=1,  # before the first step: the seconds are those of the last
        )
        grpo.train(context, problems, settings, run=run, screen=view, stop=stop)


def _problems(last: dict[str, Any], run: Path) -> list[str]:
    """What is wrong with the last step and what the run left."""
    found = [f"the step was skipped: {last['skipped']}"] if last.get("skipped") else []
    if not last.get("grad_norm"):
        found.append("the gradient is zero")
    if (gap := last.get("sampler_gap", 0.0)) > _LARGEST_GAP:
        found.append(f"the sampler's logprobs are {gap:.2g} nats from the policy's (limit {_LARGEST_GAP:g})")
    if not (run / DONE).is_file() or not list((run / "checkpoints").glob("step-*/manifest.json")):
        found.append("the run has no checkpoint or no final model")
    return found
