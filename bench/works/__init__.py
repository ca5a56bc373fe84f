"""What people wait for besides a GRPO step: each work is a module with `rows(options)`, side beside side."""

import importlib
from collections.abc import Callable

from bench.pairs import Options
from bench.table import Row

WORKS = {
    "rollouts": "answers of a group, against transformers' generate",
    "sft": "an epoch over mixed lengths and images, against TRL's SFTTrainer",
    "grading": "1,000 answers, against math-verify and mathruler",
    "loading": "problems with images from a file, against datasets",
    "checking": "`rlcs data check` and starts with 1,000 to 1,000,000 rows",
    "vllm": "rollouts and serving, against vLLM from an environment of its own",
    "sweeps": "how a GRPO step grows with group, trunk, answers and images",
}
"""The works by name, and what each is."""


def rows_of(name: str) -> Callable[[Options], list[Row]]:
    """The function that measures a work; a peer's libraries are imported with it alone."""
    found: Callable[[Options], list[Row]] = importlib.import_module(f"bench.works.{name}").rows
    return found
