"""Checks in seconds whether vLLM could start, or whether the servers of a run answer; starts no model."""

import re
import subprocess
import time
from collections.abc import Iterable, Sequence

import httpx

from rlcs.engines.vllm.server import OLDEST
from rlcs.errors import EndpointError, ModelError, RecipeError
from rlcs.patience import run_within
from rlcs.recipe.sampling import EngineSettings, Rollouts

LARGEST_SHARE = 0.6
"""Largest `memory_share` of a vLLM server on a GPU that also trains."""
_OLDEST = f"{OLDEST[0]}.{OLDEST[1]}"
_VERSION_LIMIT_S = 180.0
_POLL_S = 0.5
_SHOWN = 300


def require_startable(settings: EngineSettings, section: str) -> str:
    """Check the program `vllm` without starting a model; returns its version.

    `section` is the recipe's section of the settings. Raises ModelError if it is missing, broken or too old.
    """
    where = f"{section}.executable={settings.executable}"
    fix = (
        f"python3 -m venv vllm-env && vllm-env/bin/pip install 'vllm>={_OLDEST}', then "
        f"{section}.executable=vllm-env/bin/vllm; or {section}.engine=local, which is slower"
    )
    try:
        done = run_within(_VERSION_LIMIT_S, [settings.executable, "--version"])
    except OSError as error:
        raise ModelError(f"vLLM cannot be started: {error.strerror}", where=where, fix=fix) from error
    except subprocess.TimeoutExpired as error:
        what = f"`{settings.executable} --version` did not end in {_VERSION_LIMIT_S:g} s"
        raise ModelError(what, where=where, fix="run it by hand to see what it waits for") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2][:_SHOWN]
        raise ModelError(f"vLLM cannot be started: {last}", where=where, fix=fix)
    return _new_enough(done.stdout.strip().rpartition("\n")[2][:_SHOWN], where)


def require_quantisable(settings: Rollouts, device: str) -> None:
    """Raise RecipeError where vLLM cannot compute in the format that the recipe asks for."""
    if settings.quantization and device == "cpu":
        raise RecipeError(
            f"vLLM has no {settings.quantization} on a CPU",
            where="rollout.quantization",
            fix="leave it out here",
        )


def _new_enough(version: str, where: str) -> str:
    found = re.search(r"(\d+)\.(\d+)\S*", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        what = f"vLLM {version} is too old" if found else f"it says no version of vLLM: {version!r}"
        raise ModelError(what, where=where, fix=f"use vLLM {_OLDEST} or newer")
    return found[0]


def require_reachable(settings: Rollouts) -> None:
    """Check the servers of `rollout.urls`, each for `health_limit_s`. Raises EndpointError for a dead one."""
    with httpx.Client(trust_env=False, timeout=settings.health_limit_s) as client:
        for url in settings.urls:
            end = time.monotonic() + settings.health_limit_s
            while (why := _fault_of_server(client, url.rstrip("/"))) and time.monotonic() < end:
                time.sleep(_POLL_S)
            if why:
                raise EndpointError(
                    f"this vLLM server does not answer ({why})",
                    where=f"rollout.urls: {url}",
                    fix="start it and wait until it is ready, or correct the address; rlcs waits for it up "
                    "to rollout.dead_limit_s with study.preflight=off",
                )


def _fault_of_server(client: httpx.Client, url: str) -> str:
    """Why a server does not answer as it should; empty if it does."""
    try:
        status = client.get(f"{url}/health").status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return type(error).__name__
    return "" if status == 200 else f"HTTP {status}"


def server_gpus(settings: Rollouts, visible: Sequence[str]) -> set[str]:
    """GPUs of the servers that are started here, named as in CUDA_VISIBLE_DEVICES, of those `visible`."""
    if settings.engine == "vllm_colocated":
        return set(visible)
    if settings.engine == "local" or settings.urls:
        return set()
    named = {gpu for devices in settings.devices for gpu in _names(devices)}
    return named or set(visible[: settings.tensor_parallel])


def _names(devices: str) -> list[str]:
    return [gpu.strip() for gpu in devices.split(",")]


def require_own_gpus(
    settings: Rollouts, *, training: Iterable[str], visible: Sequence[str], command: str
) -> None:
    """Check that servers that are started here and `training` ranks do not take the same GPUs' memory.

    GPUs are named as in CUDA_VISIBLE_DEVICES; `visible` are those that the first rank sees, and `command` is
    what follows `rlcs`. Small servers (`memory_share` up to LARGEST_SHARE) may share. Raises RecipeError.
    """
    if settings.engine != "vllm_server" or settings.urls:
        return
    for devices in settings.devices:
        if len(gpus := _names(devices)) < settings.tensor_parallel:
            raise RecipeError(
                f"a server has the GPUs {', '.join(gpus)} and needs {settings.tensor_parallel}",
                where="rollout.devices",
                fix="name as many for each server as rollout.tensor_parallel says, or lower that",
            )
    taken = server_gpus(settings, visible)
    shared = sorted(taken & set(training), key=lambda gpu: (len(gpu), gpu))
    if not shared or (settings.memory_share or 1.0) <= LARGEST_SHARE:
        return
    free = [gpu for gpu in visible if gpu not in taken]
    start = f"CUDA_VISIBLE_DEVICES={','.join(free)} torchrun --nproc-per-node {len(free)} -m rlcs {command}"
    share = f"let them share with rollout.memory_share={LARGEST_SHARE:g} or less"
    own = f"start it with: {start}" if settings.devices and free else "name other GPUs in rollout.devices"
    raise RecipeError(
        f"GPU {', '.join(shared)} would train and run a vLLM server",
        where="rollout.devices",
        fix=f"{own}; or {share}",
    )
