"""Checks this machine: versions, devices, memory, and the built-in models' packed and sampled logprobs."""

import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil
import torch

from rlcs.cores import explain_threads, find_cores
from rlcs.data.sources import open_builtin
from rlcs.doctor import Finding
from rlcs.engines.local import LocalEngine
from rlcs.grading import GradePool
from rlcs.model import loading
from rlcs.model.packing import pack
from rlcs.model.parity_check import SMALLEST_LIMIT, agreement, gap
from rlcs.model.policy import score
from rlcs.model.source import BUILTIN
from rlcs.recipe.schema import Model
from rlcs.records.trees import Branch, Tree

_NEEDED = ("rlcs", "torch", "transformers", "datasets", "math-verify", "safetensors")
_OPTIONAL = {
    "tensorboard": "trackers.tensorboard",
    "trackio": "trackers.trackio",
    "wandb": "trackers.wandb",
}
_TIGHT_BYTES = 2 << 30


def facts() -> dict[str, str]:
    """Facts about this machine by name: versions, devices, memory."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    found = {"python": f"{platform.python_version()} on {platform.platform(terse=True)}"}
    found |= {name: _version(name) or "not installed" for name in _NEEDED}
    found["processor"] = explain_threads(find_cores(), os.environ, torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    found["device"] = str(loading.default_device())
    found["memory"] = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    found["disk"] = f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free here"
    found["vllm"] = _version("vllm") or "not installed here: rollout.executable names it elsewhere"
    for name, use in _OPTIONAL.items():
        found[name] = _version(name) or f"not installed: pip install {name}, for {use}"
    return found


def checks() -> list[Finding]:
    """Check free space, the packed and the sampled path on the built-in models, and the grader."""
    found = [
        _space("memory", psutil.virtual_memory().available),
        _space("disk", shutil.disk_usage(Path.cwd()).free),
    ]
    parts: dict[str, Callable[[], list[Finding]]] = {name: partial(_model, name) for name in BUILTIN}
    parts["grader"] = _grader
    for name, part in parts.items():
        try:
            found += part()
        except Exception as error:  # any error is a finding
            message = f"{type(error).__name__}: {error}"
            found.append(Finding(name=name, message=message, fix="install rlcs again in a fresh environment"))
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _space(name: str, free: int) -> Finding:
    fix = f"less than {_TIGHT_BYTES >> 30} GiB: free some before a run" if free < _TIGHT_BYTES else ""
    return Finding(name=name, message=f"{free / 2**30:.1f} GiB free", fix=fix)


def _model(model: str) -> list[Finding]:
    """Compare packed with plain logprobs, and the sampler's with the policy's."""
    vlm = loading.load(Model(name=model))
    chat = loading.make_chat(vlm)
    prompts = [chat.prompt(problem) for problem in open_builtin("builtin:puzzles?count=3&seed=1", "rl")]
    sampling = chat.sampling(n=3, temperature=1.0, top_p=1.0, max_new_tokens=24, seed=0)
    groups = LocalEngine(vlm, chat, max_rows=16).sample(prompts, sampling)
    trees = []
    for prompt, group in zip(prompts, groups, strict=True):
        answers = (Branch(ids=r.ids, weights=(1.0,) * len(r.ids), logprobs=r.logprobs) for r in group)
        trees.append(Tree(prompt=prompt, branches=tuple(answers)))
    packed = pack(trees, chat.patches)
    assert packed.sampler_logprobs is not None
    with torch.no_grad():
        scored = score(vlm, packed).logprobs.cpu()
    packing = max(agreement(vlm, chat, trees), key=lambda one: one.share)
    sampler = gap(scored - packed.sampler_logprobs.cpu(), vlm.model.dtype)
    sampler_limit = max(packing.limit, 10 * SMALLEST_LIMIT.get(vlm.model.dtype, 0.02))
    return [
        Finding(
            name=f"{name}, {model}",
            message=f"within {apart:.1g} nats of {what} (allowed {limit:.1g}), attention {vlm.attention}",
            fix=""
            if apart <= limit
            else "set model.attention=dense, and report this with the versions above",
        )
        for name, apart, limit, what in (
            ("packing", packing.gap, packing.limit, "plain logprobs"),
            ("sampler", sampler, sampler_limit, "the policy's logprobs"),
        )
    ]


def _grader() -> list[Finding]:
    problem = open_builtin("builtin:puzzles?count=1&seed=1", "rl")[0]
    texts = (f"\\boxed{{{problem.answer}}}", "\\boxed{-12345}", "no box at all")
    with GradePool(workers=1, deadline_s=5.0, allow_fallbacks=False) as pool:
        verdicts = [grade.correct for grade in pool.grade([(problem, text) for text in texts])]
    wrong = "the grader's workers give wrong grades: start rlcs where processes may be started"
    right = verdicts == [True, False, False]
    return [Finding(name="grader", message=f"right, wrong, no box: {verdicts}", fix="" if right else wrong)]
