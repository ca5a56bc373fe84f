"""`python -m bench.adapters`: what one update of the policy costs on its way to vLLM, merged and as adapters.

A random Qwen2.5-VL gets adapters in its language model and is published as every step of GRPO publishes it:
the bytes written and the seconds, medians. With `--vllm PROGRAM` a real server loads each version too.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

from bench.loading import write
from rlcs.engines.vllm.server import Launch, Server
from rlcs.engines.vllm.weights import Weights, WeightsFolder
from rlcs.model import loading
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Lora
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Model


@dataclass
class Update:
    """One way's measurements, a number an update."""

    written: list[int] = field(default_factory=list)
    publish_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)


def main() -> None:
    """Measure both ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.125, help="share of each layer's width of the 3B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--vllm", help="a vllm program, which then loads every version")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        write(folder, options.width)
        for way in ("merged", "adapter"):
            plain = loading.load(Model(name=str(folder), dtype="float32"), device=torch.device("cpu"))
            vlm = loading.prepare(plain, Lora(rank=options.rank), (), seed=0)
            published = WeightsFolder(Path(scratch) / way, as_adapters=way == "adapter")
            with server(options.vllm, options.rank, Path(scratch) / way) as load:
                found = measure(vlm, published, options.updates, load)
            report(way, sum(p.numel() for p in plain.model.parameters()), found)


def measure(vlm: Vlm, published: WeightsFolder, updates: int, load: "Load | None") -> Update:
    """Publish so many updates; the first version, with the model below the adapters, is not counted."""
    found = Update()
    for number in range(updates + 1):
        with torch.no_grad():
            for _, parameter in vlm.parameters():
                parameter.add_(1e-3)
        began = time.perf_counter()
        weights = published.publish(vlm)
        published_s = time.perf_counter() - began
        load_s = load(weights) if load is not None else 0.0
        if number:
            found.written.append(sum(file.stat().st_size for file in weights.folder.iterdir()))
            found.publish_s.append(published_s)
            found.load_s.append(load_s)
    return found


class Load:
    """Gives versions to a server; it is started with the first."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is that of all calls."""
        self._server, self._loop = server, loop

    def __call__(self, weights: Weights) -> float:
        """Seconds until the server has them."""

        async def ready() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                await self._server.up(client, weights)
                await self._server.load_weights(client, weights)

        began = time.perf_counter()
        self._loop.run_until_complete(ready())
        return time.perf_counter() - began


@contextmanager
def server(program: str | None, rank: int, logs: Path) -> Iterator[Load | None]:
    """A server that is not started yet, and ends with the context; None without a program."""
    if program is None:
        yield None
        return
    settings = Rollouts(engine="vllm_server", executable=program)
    launch = Launch(
        settings=settings, dtype="float32", max_tokens=256, max_rows=4, on_cpu=True, adapter_rank=rank
    )
    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as starter:
        one = Server(settings, 0, logs=logs, url="", launch=launch, starter=starter)
        try:
            yield Load(one, runner.get_loop())
        finally:
            one.close()


def report(way: str, parameters: int, found: Update) -> None:
    """Print one way's medians."""
    loaded = f", loaded in {statistics.median(found.load_s):.2f} s" if any(found.load_s) else ""
    print(
        f"{way:<8} {parameters:,} parameters: {statistics.median(found.written) / 1e6:8.1f} MB written in "
        f"{statistics.median(found.publish_s):.2f} s{loaded}",
        flush=True,
    )


if __name__ == "__main__":
    main()
