"""Slots of keys and values: sequences move, part and grow in place; queries on grids."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcs.engines.slots import Grid, Slots, settled

CPU = torch.device("cpu")


def numbered(count, tokens=4):
    """Slots in which sequence i has keys of i and values of -i."""
    keys = torch.arange(1.0, count + 1)[:, None, None, None].expand(count, 2, tokens, 3)
    return Slots({0: (keys.clone(), -keys), 5: (10 * keys, -10 * keys)})


def contents(slots):
    return [int(slots.layers[0][0][index, 0, 0, 0]) for index in range(slots.count)]


def test_sequences_move_and_part_without_mixing():
    slots = numbered(4)
    slots.arrange([2, 1, 1, 0, 2], 4)
    assert contents(slots) == [3, 2, 2, 1, 3]
    key, value = slots.layers[5]
    assert torch.equal(key[: slots.count], -value[: slots.count]) and key[4, 1, 3, 2] == 30
    slots.arrange([4], 2)
    assert contents(slots) == [3] and slots.space == 5, "what is free is kept"


def test_growing_keeps_what_is_there_and_appending_uses_free_slots():
    slots = numbered(3)
    slots.arrange([0, 2], 4)
    before = slots.layers[0][0]
    slots.append(numbered(1))
    assert slots.layers[0][0] is before and contents(slots) == [1, 3, 1]
    slots.append(numbered(2, tokens=9))
    assert contents(slots) == [1, 3, 1, 1, 2] and slots.tokens == 9
    slots.reserve(5, 12)
    assert contents(slots) == [1, 3, 1, 1, 2] and slots.tokens == 12


@given(st.lists(st.integers(0, 9), max_size=12))
def test_settling_moves_as_few_as_possible(sources):
    order = settled(sources)
    assert sorted(order) == list(range(len(sources)))
    stayed = sum(sources[element] == place for place, element in enumerate(order))
    assert stayed == len({source for source in sources if source < len(sources)})


@pytest.mark.parametrize("groups", [[0, 1, 2], [0, 0, 1, 1], [1, 0, 0, 2], [2, 2, 2], [1, 0]])
def test_a_grid_gives_back_what_it_was_given(groups):
    count = 3 if 2 in groups else 2
    grid = Grid(np.array(groups), count, CPU)
    x = torch.randn(len(groups), 2, 3, 5)
    spread = grid.spread(x)
    assert torch.equal(grid.gather(spread), x)
    width = max(groups.count(group) for group in groups)
    assert spread.shape == (count, 2, width * 3, 5)
    for place, group in enumerate(groups):
        column = groups[:place].count(group)
        assert torch.equal(spread[group, :, column * 3 : column * 3 + 3], x[place])
