"""Sharing work over ranks: every rank does its part, all get all results in order."""

import threading

from conftest import make_problem
from rlcs.records.trees import Branch, Tree
from rlcs.train.batching import full_packs_in_step, own_share, shared


class Rank:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, values, barrier):
        self.rank, self.size = rank, len(values)
        self._values, self._barrier = values, barrier

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(timeout=10)
        return list(self._values)


def test_ranks_share_the_work_and_all_get_all_results_in_order():
    values, barrier, results, done = [None] * 3, threading.Barrier(3), {}, {}
    words = ["a" * n for n in (7, 1, 5, 5, 3, 9, 2)]

    def run(rank):
        world = Rank(rank, values, barrier)

        def work(own):
            done[rank] = own
            return [word.upper() for word in own]

        results[rank] = shared(work, words, len, world)
        assert done[rank] == [words[i] for i in own_share([len(word) for word in words], world)]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results == {rank: [word.upper() for word in words] for rank in range(3)}
    assert sorted(word for own in done.values() for word in own) == sorted(words)
    assert max(map(len, done.values())) < len(words)


def test_a_rank_without_an_item_takes_part():
    values, barrier, results = [None] * 2, threading.Barrier(2), {}

    def run(rank):
        results[rank] = shared(
            lambda own: [x + 1 for x in own], [1], lambda x: x, Rank(rank, values, barrier)
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results == {0: [2], 1: [2]}


class OneOf:
    """A rank of several that all have packs without images."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def gather(self, flags):
        return [flags] * self.size


def test_only_full_packs_are_made_while_trees_arrive(chat):
    """Equally many on every rank; the emptiest waits for more, and no tree is lost or packed twice."""
    prompt = chat.prompt(make_problem("p", sizes=()))
    lengths = [10, 200, 30, 90, 150, 60, 120, 80, 110, 40, 70]
    trees = [Tree(prompt=prompt, branches=(Branch(ids=(30,) * n, weights=(float(n),) * n),)) for n in lengths]
    budget = 300
    for size in (1, 2, 4, 9):
        packed, left = [], []
        for rank in range(size):
            packs, left = full_packs_in_step(trees, chat, budget=budget, world=OneOf(rank, size))
            packed.append([[int(w) for w in pack.weights.unique()] for pack in packs])
            assert all(budget / 2 < pack.num_tokens <= budget for pack in packs)
        assert len({len(packs) for packs in packed}) == 1 and left
        assert bool(packed[0]) == (size < 9)
        found = [n for packs in packed for members in packs for n in members]
        assert sorted([*found, *(len(tree.branches[0].ids) for tree in left)]) == sorted(lengths)
    assert full_packs_in_step([], chat, budget=budget, world=OneOf(0, 1)) == ([], [])
