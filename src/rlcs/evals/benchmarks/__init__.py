"""Benchmarks, one module each.

Every module of this package that defines `BENCHMARK` is listed; docs/how-to/add-a-benchmark.md shows how to
add another.
"""

import importlib
import pkgutil
from dataclasses import replace

from rlcs.data.sources import suggest
from rlcs.errors import UserError
from rlcs.evals.benchmarks.base import Benchmark


def list_benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    benchmarks: dict[str, Benchmark] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if isinstance(benchmark := getattr(module, "BENCHMARK", None), Benchmark):
            benchmarks[info.name] = replace(benchmark, name=info.name)
    return benchmarks


def find(name: str) -> Benchmark:
    """Return the benchmark of this name. Raises UserError if there is none."""
    known = list_benchmarks()
    if name not in known:
        raise UserError(f"no benchmark is called {name!r}", where="--benchmarks", fix=suggest(name, known))
    return known[name]
