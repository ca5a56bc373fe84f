"""The shape of packs: invertible, exact positions, one description for every mask."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_problem, path_ids, row_inputs
from rlcs.model import packing
from rlcs.model.bins import within_budget
from rlcs.model.layout import Layout, Segment, dense_mask
from rlcs.model.packing import pack, trunk_positions
from rlcs.records import Prompt
from rlcs.records.routes import Routes
from rlcs.records.trees import Branch, Tree

IMAGE = 7
sizes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=4)), min_size=1, max_size=4
)
floats = st.floats(-4, 4, width=32)


@st.composite
def trees(draw):
    def branch(length, parent):
        ids = draw(st.lists(st.integers(8, 99), min_size=length, max_size=length))
        weights = draw(st.lists(floats, min_size=length, max_size=length))
        return Branch(
            ids=tuple(ids), weights=tuple(weights), logprobs=tuple(-abs(w) for w in weights), parent=parent
        )

    made = []
    for trunk, branches in draw(sizes.filter(lambda s: any(b for _, b in s))):
        prompt = Prompt(
            problem_id="p", ids=tuple(range(8, 8 + trunk)), images=(), grids=(), spans=(),
            image_token_id=IMAGE, merge_size=2,
        )  # fmt: skip
        grown = Tree(prompt=prompt, branches=())
        for index, length in enumerate(branches):
            parent = draw(st.sampled_from((None, *(grown.path(index - 1) if index else ()))))
            grown = Tree(prompt=prompt, branches=(*grown.branches, branch(length, parent)))
        made.append(grown)
    return made


def no_pixels(ref):
    raise AssertionError("there are no images")


def unpack(packed):
    """The (prompt ids, branches) that went in, read from the tensors alone."""
    made, at = [], 0
    branches, root = [], 0
    for index, segment in enumerate(packed.layout.segments):
        start, end = segment.start, segment.stop
        if segment.parent is None:
            branches, root = [], index
            made.append((tuple(packed.ids[start:end].tolist()), branches))
        else:
            part = slice(at, at + end - start)
            ids = tuple(packed.targets[part].tolist())
            assert tuple(packed.ids[start:end].tolist()) == ids
            parent = None if segment.parent == root else segment.parent - root - 1
            weights, logprobs = packed.weights[part].tolist(), packed.sampler_logprobs[part].tolist()
            branches.append(Branch(ids=ids, weights=tuple(weights), logprobs=tuple(logprobs), parent=parent))
            at += end - start
    return [(prompt, tuple(branches)) for prompt, branches in made]


@given(trees())
@settings(max_examples=60, deadline=None)
def test_a_pack_holds_all_that_was_packed(made):
    assert unpack(pack(made, no_pixels)) == [(tree.prompt.ids, tree.branches) for tree in made]


@given(trees())
@settings(max_examples=40, deadline=None)
def test_every_target_is_predicted_by_the_token_before_it_on_its_own_path(made):
    packed = pack(made, no_pixels)
    paths = [path_ids(tree, index) for tree in made for index in range(len(tree.branches))]
    at = 0
    for path, branch in zip(paths, [b for t in made for b in t.branches], strict=True):
        trunk = len(path) - len(branch.ids)
        for step in range(len(branch.ids)):
            assert packed.targets[at] == path[trunk + step]
            assert packed.ids[packed.predictors[at]] == path[trunk + step - 1]
            assert packed.positions[:, packed.predictors[at]].tolist() == [trunk + step - 1] * 3
            at += 1
    assert at == packed.num_targets


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_answers_that_begin_alike_are_computed_once_up_to_where_they_part(data):
    ids = st.lists(st.integers(8, 9), min_size=1, max_size=12)
    answers = data.draw(st.lists(ids, min_size=1, max_size=6))
    least = data.draw(st.integers(1, 8))
    prompt = Prompt(
        problem_id="p", ids=(1, 2, 3), images=(), grids=(), spans=(), image_token_id=IMAGE, merge_size=2
    )
    branches = tuple(
        Branch(ids=tuple(answer), weights=tuple(n + step / 100 for step in range(len(answer))))
        for n, answer in enumerate(answers)
    )
    apart = Tree(prompt=prompt, branches=branches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlcs.records.trees.LEAST_SAVED", least)
        patch.setattr("rlcs.records.trees._COMPARED", data.draw(st.integers(1, 4)))
        merged = replace(apart, merges=True)
        packed = pack([apart, merged], no_pixels)
        tokens = merged.num_tokens
    # What a branch is in the pack is read from the tensors alone, and is the same merged or not.
    half = packed.num_targets // 2
    targets, predictors = (packed.of_targets(x).tolist() for x in (packed.targets, packed.predictors))
    assert targets[half:] == targets[:half] == [i for branch in branches for i in branch.ids]
    assert packed.weights[half:].tolist() == packed.weights[:half].tolist()
    assert (packed.sequence[half:] - len(branches)).tolist() == packed.sequence[:half].tolist()
    visible, ids = dense_mask(packed.layout), packed.ids
    for before, after in zip(predictors[:half], predictors[half:], strict=True):
        assert ids[visible[after]].tolist() == ids[visible[before]].tolist()
        assert packed.positions[:, after].tolist() == packed.positions[:, before].tolist()
    if least == 1:  # as few as there can be: one for each different beginning
        beginnings = {tuple(answer[:stop]) for answer in answers for stop in range(1, len(answer) + 1)}
        assert tokens == len(prompt.ids) + len(beginnings) == packed.num_tokens - apart.num_tokens
    assert tokens <= apart.num_tokens


@given(trees())
@settings(max_examples=60, deadline=None)
def test_trees_that_share_what_their_prompts_begin_with_see_and_learn_the_same(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlcs.model.packing.LEAST_SHARE", 0.0)
        apart, together = (pack(made, no_pixels, shares_head=shares) for shares in (False, True))
    head = min(len(tree.prompt.ids) for tree in made) - 1 if len(made) > 1 else 0
    assert together.num_tokens == apart.num_tokens - head * (len(made) - 1)
    for name in ("targets", "weights", "sequence", "sampler_logprobs"):
        assert torch.equal(getattr(together, name), getattr(apart, name))
    masks = [dense_mask(packed.layout) for packed in (apart, together)]
    for before, after in zip(apart.predictors, together.predictors, strict=True):
        was, now = masks[0][before], masks[1][after]
        assert together.ids[now].tolist() == apart.ids[was].tolist()
        assert together.positions[:, now].tolist() == apart.positions[:, was].tolist()


def test_a_head_is_shared_where_it_saves_enough_and_up_to_the_first_image():
    def tree(ids, *, spans=(), weights=(), routes=None, length=2):
        prompt = Prompt(
            problem_id="p", ids=ids, images=(picture,) * len(spans), grids=((1, 2, 4),) * len(spans),
            spans=spans, image_token_id=IMAGE, merge_size=2, positions="line",
        )  # fmt: skip
        branch = Branch(ids=(30,) * length, weights=(1.0,) * length, routes=routes)
        return Tree(prompt=prompt, branches=(branch,), trunk_weights=weights)

    def head(*trees):
        return packing._common_head(trees)

    [picture] = make_problem("p").images
    text = tuple(range(10, 20))
    assert head(tree(text), tree(text)) == 9, "of each prompt a token is left"
    assert head(tree(text), tree(text), tree((10, 11, 99))) == 2
    pictured = tree((*text[:4], IMAGE, IMAGE, *text[6:]), spans=((4, 6),))
    assert head(pictured, pictured) == 4
    assert head(tree(text), tree((1, *text))) == head(tree(text)) == 0
    assert head(tree(text), tree(text, length=500)) == 0, "it saves less than it costs"
    with_routes = tree(text, routes=Routes(layers=1, chosen=1, data=bytes(2)))
    assert head(tree(text), with_routes) == 0
    # A token of the head that has a loss is a target of its own tree alone.
    learnt = pack([tree(text), tree(text, weights=(0, 1.0, *(0,) * 8))], no_pixels, shares_head=True)
    assert learnt.predictors.tolist() == [9, 10, 0, 12, 13]
    assert learnt.targets.tolist() == [30, 30, 11, 30, 30]


def test_targets_in_a_trunk_are_predicted_in_the_trunk_and_belong_to_its_branch():
    made = []
    for ids, weights in (((8, 9, 10, 11), (0.0, 0.0, 0.5, 1.0)), ((20, 21), ())):
        prompt = Prompt(
            problem_id="p", ids=ids, images=(), grids=(), spans=(), image_token_id=IMAGE, merge_size=2
        )
        branch = Branch(ids=(30, 31), weights=(2.0, 3.0))
        made.append(Tree(prompt=prompt, branches=(branch,), trunk_weights=weights))
    packed = pack(made, no_pixels)
    assert packed.targets.tolist() == [10, 11, 30, 31, 30, 31]
    assert packed.predictors.tolist() == [1, 2, 3, 4, 7, 8]
    assert packed.weights.tolist() == [0.5, 1.0, 2.0, 3.0, 2.0, 3.0]
    assert packed.sequence.tolist() == [0, 0, 0, 0, 1, 1]
    for weights, branches in (((0.0,), made[0].branches), ((1.0,) * 4, made[0].branches), ((0.0,) * 4, ())):
        with pytest.raises(ValueError, match=r"weight|predicts"):
            Tree(prompt=made[0].prompt, branches=branches, trunk_weights=weights)


@given(trees())
@settings(max_examples=60, deadline=None)
def test_the_dense_mask_shows_exactly_the_path(made):
    """Against the definition, token by token: the prompt, the branches on the path, not the future."""
    layout = pack(made, no_pixels).layout
    owner = []
    for tree, grown in enumerate(made):
        owner += [(tree, None, {None})] * len(grown.prompt.ids)
        for index, branch in enumerate(grown.branches):
            owner += [(tree, index, {None, *grown.path(index)})] * len(branch.ids)
    mask = dense_mask(layout)
    for q, (q_tree, _, path) in enumerate(owner):
        for k, (k_tree, k_branch, _) in enumerate(owner):
            assert mask[q, k] == (k <= q and q_tree == k_tree and k_branch in path)
        assert layout.depths()[q] == mask[q].sum() - 1


def test_branches_and_segments_come_depth_first():
    prompt = Prompt(
        problem_id="p", ids=(8, 9), images=(), grids=(), spans=(), image_token_id=IMAGE, merge_size=2
    )
    for parents in ((0,), (None, 1), (None, None, 0), (None, 0, None, 1)):
        branches = tuple(Branch(ids=(9,), weights=(1.0,), parent=parent) for parent in parents)
        with pytest.raises(ValueError, match="depth first"):
            Tree(prompt=prompt, branches=branches)
    for parents in ((None, None, 0), (0,), (None, 0, 0, None, 1)):
        segments = tuple(Segment(start=i, stop=i + 1, parent=p) for i, p in enumerate(parents))
        with pytest.raises(ValueError, match="depth first"):
            Layout(segments=segments)


def test_positions_are_those_of_the_model_itself(vlm, chat):
    """Those that its own forward hands to the rotation of queries and keys."""
    seen = []
    vlm.model.get_decoder().rotary_emb.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["position_ids"] if "position_ids" in named else args[1]),
        with_kwargs=True,
    )
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    for question, shape in (
        ("How many?", ((56, 84),)),
        ("First <image> then <image> and so on", ((84, 56), (112, 112))),
        ("No image at all", ()),
    ):
        prompt = chat.prompt(make_problem("p", question, shape))
        with torch.no_grad():
            vlm.model(**row_inputs(vlm, chat, torch.tensor([prompt.ids]), [prompt]))
        ours = vlm.family.position_ids(trunk_positions(prompt))
        assert seen and all(torch.equal(positions, ours) for positions in seen)
        seen.clear()


def test_every_image_goes_in_once_however_many_branches(chat):
    prompt = chat.prompt(make_problem("p"))
    branch = Branch(ids=(5, 6), weights=(1.0, 1.0))
    packed = pack([Tree(prompt=prompt, branches=(branch,) * 5)], chat.patches)
    assert packed.grids.tolist() == [list(prompt.grids[0])]
    assert len(packed.images) == 1 and len(packed.grids) == 1
    assert packed.num_tokens == len(prompt.ids) + 10


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_packs_hold_every_tree_once_and_keep_the_budget(tokens, budget):
    bins = within_budget(tokens, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(tokens)))
    for members in bins:
        assert sum(tokens[i] for i in members) <= budget or len(members) == 1


def test_an_empty_pack_is_a_mistake():
    with pytest.raises(ValueError, match="at least one tree"):
        pack([], no_pixels)
