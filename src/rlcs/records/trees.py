"""Training examples: a prompt and its answers as a tree."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.records import Prompt, Routes, require

LEAST_SAVED = 16
"""Tokens that must be saved for answers to share what they begin with: every part of a tree has a cost."""
_COMPARED = 64
"""Tokens of answers that are compared at once."""


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
class Part:
    """Tokens of a tree that are computed once. They follow the prompt, or the part number `parent`."""

    ids: tuple[int, ...]
    parent: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What of a tree is computed: its parts, depth first, and in which of them each branch has its tokens."""

    parts: tuple[Part, ...]
    paths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A training example: one prompt (the trunk) and its answers (the branches), depth first.

    `trunk_weights` are loss weights of the prompt's tokens, for earlier turns that are learnt too, in one
    sequence with the branch. Empty: the prompt has no loss. `trunk_routes` are the prompt's `Branch.routes`.
    With `merges` the model computes answers that begin alike once, up to where they part; each keeps its own
    weights and logprobs there.
    """

    prompt: Prompt
    branches: tuple[Branch, ...]
    trunk_weights: tuple[float, ...] = ()
    trunk_routes: Routes | None = None
    merges: bool = False

    def __post_init__(self) -> None:
        """Check the order of branches that fork, and the weights of the prompt's tokens."""
        for index, branch in enumerate(self.branches):
            path = (None, *self.path(index - 1)) if index else (None,)
            require(branch.parent in path, f"branch {index} does not follow its parent, depth first")
            require(not self.merges or (branch.parent is None and branch.routes is None), "it cannot merge")
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
    def shape(self) -> Shape:
        """Its parts: the branches themselves, or what is left of them when they are merged."""
        if self.merges:
            return _merged([branch.ids for branch in self.branches])
        parts = tuple(Part(ids=branch.ids, parent=branch.parent) for branch in self.branches)
        return Shape(parts=parts, paths=tuple((index,) for index in range(len(parts))))

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model computes: the trunk once, every part once."""
        return len(self.prompt.ids) + sum(len(part.ids) for part in self.shape.parts)


def _merged(answers: Sequence[tuple[int, ...]]) -> Shape:
    """Share what answers begin with, wherever that saves at least `LEAST_SAVED` tokens."""
    parts: list[Part] = []
    paths: list[tuple[int, ...]] = [()] * len(answers)

    def put(members: Sequence[int], start: int, stop: int, parent: int | None) -> int | None:
        """Make a part of tokens `start` to `stop` of some answers; returns what follows follows."""
        if start == stop:
            return parent
        parts.append(Part(ids=answers[members[0]][start:stop], parent=parent))
        for member in members:
            paths[member] += (len(parts) - 1,)
        return len(parts) - 1

    def grow(members: Sequence[int], start: int, parent: int | None) -> None:
        """Make the parts of answers that are alike up to `start`, where `parent` ends."""
        stop = _alike([answers[member] for member in members], start)
        over, further = list[int](), dict[int, list[int]]()
        for member in members:
            answer = answers[member]
            if len(answer) == stop:
                over.append(member)
            else:
                further.setdefault(answer[stop], []).append(member)
        if len(members) == 1 or (len(members) - 1) * (stop - start) >= LEAST_SAVED:
            parent, start = put(members, start, stop, parent), stop
        else:
            for member in over:
                put([member], start, stop, parent)
        for group in further.values():
            grow(group, start, parent)

    if answers:
        grow(range(len(answers)), 0, None)
    return Shape(parts=tuple(parts), paths=tuple(paths))


def _alike(answers: Sequence[tuple[int, ...]], start: int) -> int:
    """Up to where answers, which are alike up to `start`, say the same."""
    first, shortest = answers[0], min(map(len, answers))
    if len(answers) == 1:
        return shortest
    for place in range(start, shortest, _COMPARED):
        stop = min(place + _COMPARED, shortest)
        if any(answer[place:stop] != first[place:stop] for answer in answers):
            return next(i for i in range(place, stop) if any(answer[i] != first[i] for answer in answers))
    return shortest
