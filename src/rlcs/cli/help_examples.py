"""The examples at the end of every command's help."""

from collections.abc import Mapping
from types import MappingProxyType

import typer

EXAMPLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quickstart": ("rlcs quickstart", "rlcs quickstart --out runs/short grpo.steps=20"),
        "run": (
            "rlcs run mine.yaml --dry-run",
            "rlcs run mine.yaml",
            "rlcs run single-gpu-lora-3b --data sharegpt.json --out runs/mine",
            "rlcs run mine.yaml data.rl=train.jsonl data.test=test.jsonl",
            "torchrun --nproc-per-node 8 -m rlcs run paper-7b",
        ),
        "sft": ("rlcs sft mine.yaml --out runs/mine", "rlcs sft quickstart data.cold_start=sharegpt.json"),
        "grpo": ("rlcs grpo mine.yaml", "rlcs grpo quickstart model.name=runs/mine/sft/final"),
        "ablate": ("rlcs ablate mine.yaml", "rlcs ablate quickstart --seeds 3"),
        "coldstart": (
            "rlcs coldstart mine.yaml",
            "rlcs coldstart quickstart --demonstrations 200,600 grpo.steps=30",
        ),
        "distill": (
            "rlcs distill mine.yaml data.problems=train.jsonl",
            "rlcs distill mine.yaml teacher.base_url=http://localhost:8000/v1",
        ),
        "eval": (
            "rlcs eval runs/mine/sft_grpo/final --benchmarks mathvista,wemath",
            "rlcs eval builtin --benchmarks geometry3k --limit 100 --data official",
        ),
        "grade": (
            "rlcs grade answers.jsonl --out graded.jsonl",
            "rlcs grade --response 'so \\boxed{1/2}' --gold 0.5",
        ),
        "report": ("rlcs report runs/mine", "rlcs report runs/mine --live"),
        "compare": ("rlcs compare runs/a runs/b",),
        "look": ("rlcs look quickstart", "rlcs look train.jsonl --row 0"),
        "serve": ("rlcs serve runs/mine/sft_grpo/final", "rlcs serve builtin --port 8001"),
        "generate": (
            "rlcs generate builtin 'How many?' --image apples.png",
            "rlcs generate builtin --input problems.jsonl --output answers.jsonl",
        ),
        "chat": ("rlcs chat builtin", "rlcs chat runs/mine/sft/final runs/mine/sft_grpo/final"),
        "export": ("rlcs export runs/mine --out exported", "rlcs export runs/mine --arm sft --out exported"),
        "publish": ("rlcs publish exported OWNER/NAME --dry-run",),
        "doctor": (
            "rlcs doctor",
            "rlcs doctor runs/mine",
            "rlcs doctor runs/mine --replay",
            "rlcs doctor --gpu --out gpu.json",
        ),
        "plan": ("rlcs plan paper-7b --gpus 8", "rlcs plan single-gpu-lora-3b --gpu RTX4090 --json"),
        "data check": ("rlcs data check train.jsonl", "rlcs data check sft.jsonl --role cold_start"),
        "data difficulty": (
            "rlcs data difficulty rl.jsonl --recipe mine.yaml --out rated.jsonl",
            "rlcs data difficulty rl.jsonl --recipe mine.yaml --blind --out rated.jsonl",
        ),
        "data export": ("rlcs data export runs/mine/cold_start/kept.jsonl shared --layout ms-swift",),
        "data push": ("rlcs data push shared OWNER/NAME --dry-run",),
        "data overlap": ("rlcs data overlap train.jsonl test.jsonl",),
        "recipes ls": ("rlcs recipes ls",),
        "recipes show": ("rlcs recipes show quickstart", "rlcs recipes show mine.yaml grpo.steps=20"),
        "recipes copy": ("rlcs recipes copy recommended-7b mine.yaml",),
        "recipes check": ("rlcs recipes check mine.yaml",),
        "recipes explain": ("rlcs recipes explain grpo.clip_high", "rlcs recipes explain grpo.reward"),
    }
)
"""Examples of every command, by its words after `rlcs`."""


def add_examples(app: typer.Typer, prefix: str = "") -> None:
    """Put the examples under the help of every command of an app."""
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        lines = "\n".join(f"  {line}" for line in EXAMPLES.get(f"{prefix}{name}", ()))
        command.epilog = f"\b\nExamples:\n{lines}"  # \b: the lines are not joined
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_examples(group.typer_instance, f"{group.name} " if isinstance(group.name, str) else prefix)
