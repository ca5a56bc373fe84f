"""Divides items by their sizes: into packs that a budget limits, or into even shares. Imports no torch."""

from collections.abc import Sequence


def within_budget(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Split trees of `sizes` tokens into packs of at most `budget` tokens: lists of indices.

    First fit, largest first; indices keep their order inside a pack. A tree larger than the budget
    gets a separate pack: it is never cut.
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for number, (used, members) in enumerate(bins):
            if used + sizes[index] <= budget:
                bins[number] = (used + sizes[index], [*members, index])
                break
        else:
            bins.append((sizes[index], [index]))
    return [sorted(members) for _, members in bins]


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Split items of `sizes` into `parts` shares of about the same sum: lists of indices, in order.

    Largest first, each to the smallest share so far (Graham 1969: at most 4/3 of the best split).
    """
    shares: list[tuple[int, list[int]]] = [(0, []) for _ in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        smallest = min(range(parts), key=lambda share: shares[share][0])
        used, members = shares[smallest]
        shares[smallest] = (used + sizes[index], [*members, index])
    return [sorted(members) for _, members in shares]
