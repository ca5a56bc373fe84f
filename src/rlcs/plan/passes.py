"""The time of passes over a step's packs: work, waiting for the fullest rank, and traffic between GPUs.

Packs are made as training makes them (`train.batching`): every optimiser step's trees are shared out over
the ranks by tokens, and a rank's trees packed within the budget. The ranks of a sharded model go through
their packs together, so the largest pack of each round decides how long it takes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from rlcs.model.bins import balanced, within_budget
from rlcs.plan.machine import GIB
from rlcs.plan.placement import Placement
from rlcs.plan.rates import LINK, NETWORK, NODE, Speeds
from rlcs.plan.work import Trees, language, vision
from rlcs.recipe.schema import Images
from rlcs.recipe.section import FrozenPart
from rlcs.recipe.stages import Grpo


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """Operations (rounds, ranks) of one forward pass over the packs of a step, by part of the model."""

    language: NDArray[np.float64]
    vision: NDArray[np.float64]

    @property
    def count(self) -> int:
        """The number of rounds: packs of each rank."""
        return len(self.language)

    def operations(self, language_times: float, tower_times: float) -> float:
        """The operations of all packs on all ranks, so many times."""
        return float(language_times * self.language.sum() + tower_times * self.vision.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """Seconds of passes over all packs of a step.

    They are those of work in the mean of the ranks, of waiting for the rank with the most, and of traffic
    that no work hides.
    """

    work: float
    waiting: float
    traffic: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.work + self.waiting + self.traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes between devices in one pass over one pack; nothing hides the `exposed` ones of them."""

    total: float
    exposed: float


NO_TRAFFIC = Traffic(total=0.0, exposed=0.0)


def update_times(place: Placement, frozen: Collection[FrozenPart]) -> tuple[int, int]:
    """How often an update does the work of a forward pass, by language model and tower.

    Frozen parts need gradients of activations only; a frozen tower, which comes first, needs none.
    """
    trains = place.trains(frozen)
    half = 3 if place.checkpointing else 2
    whole = half if place.lora.rank else half + 1
    return whole if "language_model" in trains else half, whole if "vision_tower" in trains else 1


def recomputed_times(place: Placement, frozen: Collection[FrozenPart]) -> tuple[int, int]:
    """How many of these are activations that are computed again."""
    again = int(place.checkpointing)
    return again, again if "vision_tower" in place.trains(frozen) else 0


def kept_features(place: Placement, grpo: Grpo, trees: Trees, images: Images) -> float:
    """The share of the images for which a frozen tower runs once a step and not in every pass."""
    needed = _feature_bytes(place, grpo, trees)
    return min(1.0, images.features_gb * GIB / needed) if needed else 0.0


def kept_bytes(place: Placement, grpo: Grpo, trees: Trees, images: Images) -> float:
    """Bytes of what a frozen tower returned, kept on one device, in the format of the computation."""
    share = kept_features(place, grpo, trees, images)
    return share * _feature_bytes(place, grpo, trees) * place.compute / place.weight


def _feature_bytes(place: Placement, grpo: Grpo, trees: Trees) -> int:
    """Bytes of a frozen tower's output for one device's images, as the limit counts them; 0 if used once."""
    passes = (grpo.optimizer_steps > 1 and grpo.old_logprobs == "policy") + grpo.kl.active + 1
    if (
        not place.sizes.keeps_features
        or not trees.patches
        or passes == 1
        or "vision_tower" in place.trains(grpo.freeze)
    ):
        return 0
    tower = place.sizes.vision
    tokens = trees.patches // tower.merge**2
    own = -(-trees.count // (grpo.optimizer_steps * place.trainers))
    return own * tokens * tower.features * place.weight * grpo.optimizer_steps


def rounds_of(
    place: Placement, groups: Sequence[Sequence[int]], trees: Trees, *, steps: int, budget: int
) -> Rounds:
    """Pack the groups of a step, which has `steps` optimiser steps, as training does."""
    image = vision(place.sizes.vision, trees.patches) if trees.patches else 0.0
    size = -(-len(groups) // steps)
    rows: list[list[tuple[float, float]]] = []
    for start in range(0, len(groups), size):
        share = groups[start : start + size]
        tokens = [trees.trunk + sum(lengths) for lengths in share]
        work = [language(place.sizes, trees.trunk, lengths) for lengths in share]
        ranks = []
        for own in balanced(tokens, place.trainers):
            packs = within_budget([tokens[i] for i in own], budget)
            ranks.append([(sum(work[own[i]] for i in pack), len(pack) * image) for pack in packs])
        rows += [list(row) for row in zip_longest(*ranks, fillvalue=(0.0, 0.0))]
    operations = np.array(rows)
    return Rounds(language=operations[..., 0], vision=operations[..., 1])


def passed(
    place: Placement,
    rounds: Rounds,
    times: tuple[float, float],
    traffic: Traffic,
    speeds: Speeds,
    *,
    share: str,
) -> Passed:
    """Seconds of `times` the operations of a forward pass through language model and tower."""
    seconds = (rounds.language * times[0] + rounds.vision * times[1]) / (place.peak * speeds[share])
    longest = seconds.max(axis=1)
    link = speed_of_link(place, speeds)
    # Traffic goes on while the GPU computes, but for the first layers' weights and the last ones' gradients.
    hidden = (traffic.total - traffic.exposed) / link
    beyond = np.maximum(0.0, hidden - longest).sum() + rounds.count * traffic.exposed / link
    mean = float(seconds.mean(axis=1).sum())
    return Passed(work=mean, waiting=float(longest.sum()) - mean, traffic=float(beyond))


def speed_of_link(place: Placement, speeds: Speeds) -> float:
    """Bytes a second that a device receives from those that share the model with it."""
    return speeds["collective"] if place.shards <= NODE else min(speeds["collective"], NETWORK)


def forward_traffic(place: Placement) -> Traffic:
    """Weights that are gathered in a forward pass: each device receives all but its own part."""
    if not place.sharded or place.shards == 1:
        return NO_TRAFFIC
    sizes, others = place.sizes, 1 - 1 / place.shards
    return Traffic(
        total=sizes.total * place.compute * others,
        exposed=sizes.outside_layers * place.compute * others,
    )


def update_traffic(place: Placement, trained: int) -> Traffic:
    """Weights gathered in the forward and again in the backward pass, and gradients of `trained` numbers.

    Where several groups of devices hold the model, they add up the gradients of their parts over the network,
    which takes as long as so many more bytes on the link.
    """
    if place.trainers == 1 or not place.sharded:
        return NO_TRAFFIC
    forward = forward_traffic(place)
    times = 2 if place.parallel.reshard_after_forward else 1
    outside = min(trained, place.sizes.outside_layers)
    part = (1 - 1 / place.shards) * place.reduce
    copies = place.trainers / place.shards
    slower = place.machine.device.link * LINK / NETWORK if place.trainers > NODE else 1.0
    part += 2 * (1 - 1 / copies) / place.shards * place.reduce * slower
    return Traffic(total=times * forward.total + trained * part, exposed=forward.exposed + outside * part)
