"""Command line: `python -m tools.tiny_model --out DIR`."""

import argparse
import sys
from pathlib import Path

from tools.tiny_model import FAMILIES, pretrain
from tools.tiny_model.teacher import make_teacher


def main() -> None:
    """Make a built-in model again and print how well it sees."""
    parser = argparse.ArgumentParser(description="Build and pre-train a built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, processor and card")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, help="of the first course, of 32 lessons (1600); of the teacher, of 16 (260)"
    )
    parser.add_argument(
        "--teacher", action="store_true", help="grow the shipped model and teach it to reason"
    )
    choices = parser.parse_args()

    def report(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    if choices.teacher:
        scores = make_teacher(choices.out, seed=choices.seed, steps=choices.steps or 260, report=report)
    else:
        scores = pretrain(
            choices.out, family=choices.family, seed=choices.seed, steps=choices.steps or 1600, report=report
        )
    for name, value in scores.items():
        report(f"{name:30} {100 * value:5.1f}%")


if __name__ == "__main__":
    main()
