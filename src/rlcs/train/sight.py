"""The reward for looking at the image (PAPO): the same trees once more, with masked images.

A second pack has the same trunk and branches, and sees black patches: prompt and images go through the model
once per tree here, too. Its vision features are never kept, as every step masks other patches.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rlcs.model.packing import Pack
from rlcs.model.policy import Scores, score
from rlcs.recipe.stages import Grpo
from rlcs.train.context import GrpoContext
from rlcs.train.losses import LossSums, sight_loss
from rlcs.train.trainer import Batch, Objective


def with_sight(objective: Objective, context: GrpoContext, settings: Grpo, *, seed: int) -> Objective:
    """The objective with what PAPO adds to its loss; `seed` decides which patches are masked.

    Masked logprobs are those of the policy as it is, in every optimiser step. In the authors' runs they are
    those of the rollout step's beginning: the same in the first of several optimiser steps. All ranks score
    equally many packs, also such as have no images.
    """
    sight = settings.sight
    pixels = partial(context.chat.masked_patches, share=sight.mask_share, seed=seed)

    def together(batch: Batch, scores: Scores) -> LossSums:
        # Experts, too, are chosen by what it sees.
        masked = replace(batch.pack, pixels=pixels, kept=None, routes=None)
        with torch.set_grad_enabled(sight.gradient == "both"):
            blind = score(context.vlm, masked, temperature=settings.temperature)
        device = scores.logprobs.device
        added = sight_loss(
            scores.logprobs,
            blind.logprobs,
            pictured(batch.pack).to(device),
            batch.pack.sequence.to(device),
            settings=sight,
            average=settings.loss_average,
        )
        sums = objective(batch, scores)
        return replace(sums, loss=sums.loss + added.loss, sums={**sums.sums, **added.sums})

    return together


def pictured(pack: Pack) -> Tensor:
    """1 for target tokens (N,) of trees with an image, 0 for others."""
    roots: list[int] = []
    for index, segment in enumerate(pack.layout.segments):
        roots.append(index if segment.parent is None else roots[segment.parent])
    trunks = [pack.layout.segments[root] for root in roots]
    starts = [start for start, _ in pack.layout.images]
    has_image = [any(trunk.start <= start < trunk.stop for start in starts) for trunk in trunks]
    sizes = torch.tensor([len(segment) for segment in pack.layout.segments])
    of_tokens = torch.tensor(has_image, dtype=torch.float32).repeat_interleave(sizes)
    return pack.of_targets(of_tokens[pack.predictors])
