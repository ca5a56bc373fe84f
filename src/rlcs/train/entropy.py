"""Entropy control of RL: the tokens that are held, and an entropy bonus whose weight adapts.

Clip-Cov and KL-Cov ("The entropy mechanism of reinforcement learning for reasoning language models", arXiv
2505.22617): what lowers the entropy is a few tokens with a high covariance of logprob and advantage,

    cov_t = (log pi(t) - mean of log pi) (A_t - mean of A),    means over N tokens.

Clip-Cov draws r N tokens among those with low < cov < high, which get no gradient; KL-Cov gives those of the
k N highest covariances a penalty on their log ratio (`losses.policy_loss`).

The authors' code takes the means, and chooses, in every micro-batch, so that a loss depends on how answers
are packed. Here N are all tokens of an optimiser step, of all ranks, and log pi is the sampler's, which is
known before anything is packed: so all ranks choose alike without asking each other. Two things follow. In
all but the first optimiser step of a rollout step, covariances are those at sampling, not those of the policy
by then. And the authors draw among the tokens that the clip does not hold, which is not known yet: a token
that is drawn here may have no gradient anyway. A token without an advantage is never held.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlcs.recipe.objectives import Entropy
from rlcs.records.trees import Tree
from rlcs.train.trainer import StepResult

KEY = "entropy_bonus"
"""Of the bonus in what a stage carries from step to step."""


def with_held_tokens(
    trees: Sequence[Tree], others: Sequence[Tree], entropy: Entropy, *, seed: int
) -> list[Tree]:
    """The trees of an optimiser step with their held tokens marked; `others` count in the means only.

    The choice does not depend on the order in which they come. `seed` is that of the draw.
    """
    ranked = sorted([(tree, True) for tree in trees] + [(tree, False) for tree in others], key=_identity)
    branches = [branch for tree, _ in ranked for branch in tree.branches]
    chosen = held_tokens(
        torch.tensor([x for branch in branches for x in branch.weights], dtype=torch.float64),
        torch.tensor([x for branch in branches for x in branch.logprobs or ()], dtype=torch.float64),
        entropy,
        seed=seed,
    )
    left, start, marked = sorted(chosen.tolist(), reverse=True), 0, list[Tree]()
    for tree, learns in ranked:
        of_tree = []
        for branch in tree.branches:
            held, stop = list[int](), start + len(branch.ids)
            while left and left[-1] < stop:
                held.append(left.pop() - start)
            of_tree.append(replace(branch, held=tuple(held)))
            start = stop
        if learns:
            marked.append(replace(tree, branches=tuple(of_tree)))
    return marked


def _identity(ranked: tuple[Tree, bool]) -> tuple[str, tuple[tuple[int, ...], ...], bool]:
    """What tells trees apart, in whatever order they come."""
    tree, learns = ranked
    return tree.prompt.problem_id, tuple(branch.ids for branch in tree.branches), learns


def held_tokens(advantages: Tensor, logprobs: Tensor, entropy: Entropy, *, seed: int) -> Tensor:
    """Indices of the tokens that are held, of those (N,) of an optimiser step; for the formulas see above."""
    covariance = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    count = max(1, int(entropy.held_share * len(advantages)))
    able = advantages != 0
    if entropy.control == "kl_cov":
        [candidates] = able.nonzero(as_tuple=True)
        return candidates[covariance[candidates].argsort(descending=True, stable=True)[:count]]
    low, high = entropy.bounds
    [candidates] = (able & (covariance > low) & (covariance < high)).nonzero(as_tuple=True)
    drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return candidates[drawn[:count]]


class EntropyBonus:
    """The weight of the entropy bonus, which follows the entropy of the steps before.

    Skywork-OR1 (arXiv 2505.22312, adaptive entropy control): a token's loss is less by alpha H, its entropy,
    with alpha = c where the policy's entropy is at most the target, else 0. c begins at 0; after a step it
    rises by a fixed amount where the entropy was below the target, and falls by it where it was above. Here
    packs are learnt from as they come, and a step's entropy is known when its gradient is: so alpha goes by
    the entropy of the rollout step before, and is 0 in the first one. c stays between 0 and `bonus_max`.
    """

    def __init__(self, settings: Entropy, carried: dict[str, Any]) -> None:
        """`carried` is what checkpoints hold: c and the last entropy are read and kept there."""
        self._settings, self._carried = settings, carried

    @property
    def weight(self) -> float:
        """The alpha of the next step."""
        state = self._carried.get(KEY)
        if state is None or self._settings.control != "bonus" or state["entropy"] > self._settings.target:
            return 0.0
        return float(state["coefficient"])

    def after(self, result: StepResult | None) -> dict[str, float]:
        """Take up the entropy of a step, if it had a gradient; values for its report, if there is a bonus."""
        if self._settings.control != "bonus":
            return {}
        values = {"entropy_weight": self.weight}
        entropy = result.values.get("entropy", math.nan) if result else math.nan
        if math.isfinite(entropy):
            target, before = self._settings.target, self._carried.get(KEY, {}).get("coefficient", 0.0)
            moved = before + ((entropy < target) - (entropy > target)) * self._settings.bonus_step
            coefficient = min(max(moved, 0.0), self._settings.bonus_max)
            self._carried[KEY] = {"coefficient": coefficient, "entropy": entropy}
        return values
