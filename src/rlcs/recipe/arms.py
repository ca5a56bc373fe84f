"""The arms of a study: their names, the arm that each one's training starts from, and their order.

An arm's name is also its run directory, its colour in charts (a CSS variable) and its folder below `eval/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ArmName = Literal["base", "sft", "grpo", "sft_grpo", "mixed"]
RlArm = Literal["sft_grpo", "grpo", "mixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One arm. `parent` is the arm whose model is trained further (None: nothing is trained).

    `label` names the arm in tables, `stage` its training; `story` describes its model in a sentence.
    """

    name: ArmName
    parent: ArmName | None
    label: str
    stage: str
    story: str


def _table(*arms: Arm) -> Mapping[str, Arm]:
    return MappingProxyType({arm.name: arm for arm in arms})


ARMS = _table(
    Arm(
        name="base",
        parent=None,
        label="Base",
        stage="",
        story="The base model, without any training.",
    ),
    Arm(
        name="sft",
        parent="base",
        label="SFT only",
        stage="SFT",
        story="Cold start only: supervised fine-tuning on checked reasoning.",
    ),
    Arm(
        name="grpo",
        parent="base",
        label="RL only",
        stage="RL only",
        story="Reinforcement learning (GRPO) straight from the base model, without a cold start.",
    ),
    Arm(
        name="sft_grpo",
        parent="sft",
        label="Cold start + RL",
        stage="RL after SFT",
        story="Two stages: a cold start (supervised fine-tuning on checked reasoning), then reinforcement "
        "learning (GRPO) with a rule-checked reward.",
    ),
    Arm(
        name="mixed",
        parent="base",
        label="Mixed",
        stage="Mixed",
        story="One stage: every step learns from a rule-checked reward (GRPO) and from demonstrations.",
    ),
)
"""Every arm, in the order of results."""
TRAINING_ORDER: tuple[ArmName, ...] = ("sft", "sft_grpo", "grpo", "mixed")
"""Arms that are trained, a parent before its child."""
RL_ARMS: tuple[RlArm, ...] = ("sft_grpo", "grpo", "mixed")
"""Arms whose training is GRPO."""
MAIN_FIRST: tuple[ArmName, ...] = ("sft_grpo", "mixed", "grpo", "sft", "base")
"""Arms from the main one on: the first of these that a run has is the one whose model is exported."""


COMMAND_ARMS: Mapping[str, tuple[ArmName, ...]] = MappingProxyType(
    {
        "quickstart": ("base", "sft", "grpo", "sft_grpo"),
        "ablate": ("base", "sft", "grpo", "sft_grpo"),
        "coldstart": ("base", "sft", "grpo", "sft_grpo"),
        "sft": ("base", "sft"),
        "grpo": ("base", "grpo"),
    }
)
"""The arms of commands that do not take those of the recipe."""


def arms_override(command: str) -> list[str]:
    """The override (`key=value`) with which a command begins; empty for those that run the recipe's arms."""
    return [f"study.arms=[{', '.join(COMMAND_ARMS[command])}]"] if command in COMMAND_ARMS else []


def stages_behind(arm: str) -> tuple[str, ...]:
    """The run directories of the stages that made an arm's model, in the order of training."""
    stages: tuple[str, ...] = ()
    while (parent := ARMS[arm].parent) is not None:
        stages = (arm, *stages)
        arm = parent
    return ("cold_start", *stages) if {"sft", "mixed"} & {*stages} else stages


def gain_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Each of some arms beside the one it was trained from, and beside the base; the main arm is last."""
    ordered = [arm for arm in reversed(MAIN_FIRST) if arm in arms]
    pairs = [(arm, other) for arm in ordered for other in (ARMS[arm].parent, "base") if other in arms]
    return [(arm, other) for arm, other in dict.fromkeys(pairs) if other and other != arm]
