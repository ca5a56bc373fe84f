"""RL with Cold Start: two-stage training of vision-language models on trees of answers.

`rlcs.load(model).ask(image, question)` asks a model. The other names are the parts of a custom training
loop (`examples/own_loop.py`). Each is imported when it is first used: `import rlcs` loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlcs.engines.local import LocalEngine
    from rlcs.errors import RlcsError
    from rlcs.grading import GradePool
    from rlcs.model.chat import Chat
    from rlcs.model.packing import Pack, pack
    from rlcs.model.policy import Scores, score
    from rlcs.model.vlm import Vlm
    from rlcs.recipe.stages import Optimizer
    from rlcs.records import Grade, Problem, Prompt, Rollout, Sampling
    from rlcs.records.trees import Branch, Tree
    from rlcs.serving.session import Session
    from rlcs.train.losses import LossSums, advantages
    from rlcs.train.trainer import Batch, Trainer

__all__ = [
    "Batch", "Branch", "Chat", "Grade", "GradePool", "LocalEngine", "LossSums", "Optimizer", "Pack",
    "Problem", "Prompt", "RlcsError", "Rollout", "Sampling", "Scores", "Trainer", "Tree", "Vlm",
    "advantages", "load", "load_policy", "load_problems", "pack", "score",
]  # fmt: skip

_MODULES = {
    "rlcs.engines.local": ("LocalEngine",),
    "rlcs.errors": ("RlcsError",),
    "rlcs.grading": ("GradePool",),
    "rlcs.model.chat": ("Chat",),
    "rlcs.model.packing": ("Pack", "pack"),
    "rlcs.model.policy": ("Scores", "score"),
    "rlcs.model.vlm": ("Vlm",),
    "rlcs.recipe.stages": ("Optimizer",),
    "rlcs.records": ("Grade", "Problem", "Prompt", "Rollout", "Sampling"),
    "rlcs.records.trees": ("Branch", "Tree"),
    "rlcs.train.losses": ("LossSums", "advantages"),
    "rlcs.train.trainer": ("Batch", "Trainer"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used. Raises AttributeError."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"rlcs has no {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(model: str = "builtin") -> "Session":
    """Load a model to ask. Raises UserError, RunFolderError, ModelError.

    `model` is a folder in Hugging Face format, a hub id, `builtin`, or a run: `runs/mine` (its main model),
    `runs/mine/sft` (that of a stage), `runs/mine@80` (that of a kept step).
    """
    from rlcs.serving.session import load

    return load(model)


def load_policy(model: str = "builtin") -> "tuple[Vlm, Chat]":
    """Load a model to train, all of its parameters, and its chat format. Raises ModelError.

    `model` as for `load`. The chat format makes prompts (`prompt`, `conversation`), sampling settings that
    fit the model (`sampling`) and the pixels of a pack (`patches`).
    """
    from rlcs.model import loading
    from rlcs.recipe.schema import Model

    vlm = loading.load(Model(name=model))
    return vlm, loading.make_chat(vlm)


def load_problems(source: str) -> "list[Problem]":
    """Load problems with answers from a file, folder, hub id or `builtin:NAME?count=...&seed=...`.

    Raises DataError for a source that cannot be used, or when more than 1% of its rows cannot.
    """
    from rlcs.data.loading import load, require_usable
    from rlcs.recipe.schema import Data, Images

    settings = Data()
    loaded = load(source, settings, decode_limit=Images().decode_limit, role="rl")
    require_usable(loaded, settings)
    return [row.problem for row in loaded.rows]
