"""Training examples: a prompt and its answers as a tree."""

from dataclasses import dataclass

from rlcs.records import Prompt, Routes, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One answer of a tree: ids (T,), loss weights (T,), and the sampler's logprobs (T,) if any.

    `routes` are the experts that computed its first tokens in sampling, if they are to be replayed.
    `held` are the indices of tokens that entropy control holds (see `train.entropy`).
    It follows the prompt, or the branch of its tree with the index `parent`: an answer that forks.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    logprobs: tuple[float, ...] | None = None
    parent: int | None = None
    routes: Routes | None = None
    held: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check for one weight (and logprob) for each token."""
        require(bool(self.ids), "a branch needs at least one token")
        require(len(self.ids) == len(self.weights), "one weight a token")
        require(self.logprobs is None or len(self.logprobs) == len(self.ids), "one logprob a token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A training example: one prompt (the trunk) and its answers (the branches), depth first.

    `trunk_weights` are loss weights of the prompt's tokens, for earlier turns that are learnt too, in one
    sequence with the branch. Empty: the prompt has no loss. `trunk_routes` are the prompt's `Branch.routes`.
    """

    prompt: Prompt
    branches: tuple[Branch, ...]
    trunk_weights: tuple[float, ...] = ()
    trunk_routes: Routes | None = None

    def __post_init__(self) -> None:
        """Check the order of branches that fork, and the weights of the prompt's tokens."""
        for index, branch in enumerate(self.branches):
            path = (None, *self.path(index - 1)) if index else (None,)
            require(branch.parent in path, f"branch {index} does not follow its parent, depth first")
        if not self.trunk_weights:
            return
        require(len(self.trunk_weights) == len(self.prompt.ids), "one weight a token of the prompt")
        require(self.trunk_weights[0] == 0, "nothing predicts the first token")
        require(len(self.branches) == 1 and self.branches[0].logprobs is None, "weights of one plain branch")

    def path(self, index: int) -> tuple[int, ...]:
        """Indices of the branches between the prompt and the end of one branch, that branch last."""
        parent = self.branches[index].parent
        return (*(() if parent is None else self.path(parent)), index)

    @property
    def trunk_targets(self) -> tuple[int, ...]:
        """Indices of the prompt's tokens that have a loss."""
        return tuple(index for index, weight in enumerate(self.trunk_weights) if weight)

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model computes: the trunk once, every branch once."""
        return len(self.prompt.ids) + sum(len(b.ids) for b in self.branches)
