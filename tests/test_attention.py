"""FlexAttention's block masks and compiled kernel against the plain ones; the kernel is compiled for real.

On a CPU its forward pass is compiled to C++; its backward pass exists on GPUs only, and is traced here.
"""

import functools
import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlcs.errors import TrainingError
from rlcs.model import attention
from rlcs.model.attention import BLOCK, MAX_GRAPHS, DensePlan, FlexPlan, block_mask
from rlcs.model.layout import PATH, Layout, Scope, Segment, dense_mask, layout_of
from rlcs.model.tree_attention import ALONE, TreePlan, blocks_of

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 32


def random_layout(seed: int, *, longest: int = 600) -> Layout:
    """Up to six trees of up to five branches; some branches are empty, some trees have none."""
    draw = random.Random(seed)
    sizes = []
    for _ in range(draw.randint(1, 6)):
        branch, trunk = draw.choice([10, 80, longest // 2]), draw.choice([20, 150, longest])
        branches = [draw.randint(seed % 2, branch) for _ in range(draw.randint(0, 5))]
        sizes.append((draw.randint(1, trunk), branches))
    return layout_of(sizes) if seed % 3 else forked(sizes, draw)


def forked(sizes: list[tuple[int, list[int]]], draw: random.Random) -> Layout:
    """Trees whose branches follow the trunk or one of those on the path before them."""
    segments: list[Segment] = []
    for trunk, branches in sizes:
        path: list[int] = []
        for length in (trunk, *branches):
            del path[draw.randint(1, len(path)) if path else 0 :]
            start = segments[-1].stop if segments else 0
            segments.append(Segment(start=start, stop=start + length, parent=path[-1] if path else None))
            path.append(len(segments) - 1)
    return Layout(segments=tuple(segments))


def with_images(layout: Layout, seed: int) -> Layout:
    """Up to three images in each trunk, some next to each other."""
    draw, images = random.Random(seed), []
    for trunk in layout.trunks:
        cuts = sorted(draw.randint(trunk.start, trunk.stop) for _ in range(6))
        pairs = [cuts[:2], cuts[2:4], cuts[4:]] if seed % 2 else [cuts[1:3], cuts[2:4]]
        images += [(start, stop) for start, stop in pairs if start < stop]
    return Layout(segments=layout.segments, images=tuple(images))


SCOPES = [
    Scope(window=1), Scope(window=40, images=True), Scope(window=128), Scope(window=200, images=True),
    Scope(images=True), Scope(window=10**6, images=True),
]  # fmt: skip


def inputs(layout: Layout, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.length)
    return [
        torch.randn(1, heads, layout.length, SIZE, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def same_lists(ours: BlockMask, theirs: BlockMask) -> bool:
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in BlockMask._TENSOR_ATTRS]
    return all(
        b is None if a is None else a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in pairs
    )


EDGES = [
    layout_of(sizes)
    for sizes in (
        [(128, [])],
        [(1, [])],
        [(128, [128])],
        [(128, [64, 64, 128]), (256, [])],
        [(512, [512, 512])],
        [(100, [28, 100, 28]), (1, [255])],
    )
]


def seen_by_definition(layout: Layout, scope: Scope) -> torch.Tensor:
    """Which tokens see which, one by one: on the path and in the window, or later in the same image."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for segment in layout.segments:
        before, parent = [], segment.parent
        while parent is not None:
            above = layout.segments[parent]
            before, parent = [*range(above.start, above.stop), *before], above.parent
        path = torch.tensor([*before, *range(segment.start, segment.stop)])
        for depth, token in enumerate(path[len(before) :].tolist(), start=len(before)):
            window = depth + 1 if scope.window is None else scope.window
            mask[token, path[max(0, depth + 1 - window) : depth + 1]] = True
    for start, stop in layout.images if scope.images else ():
        mask[start:stop, start:stop] |= torch.ones(stop - start, stop - start, dtype=torch.bool).triu()
    return mask


@pytest.mark.parametrize("scope", [PATH, *SCOPES])
@pytest.mark.parametrize("seed", range(4))
def test_the_dense_mask_is_what_the_scope_says(scope, seed):
    layout = with_images(random_layout(seed, longest=120), seed)
    assert torch.equal(dense_mask(layout, scope), seen_by_definition(layout, scope))
    assert torch.equal(dense_mask(layout, scope.within(layout)), dense_mask(layout, scope))


LAYOUTS = EDGES + [random_layout(seed) for seed in range(60)]


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_block_masks_are_those_that_the_whole_mask_gives(index):
    layout = with_images(LAYOUTS[index], index)
    for scope in (PATH, SCOPES[index % len(SCOPES)]):
        ours = block_mask(layout, CPU, scope)
        order = torch.arange(layout.length)
        assert torch.equal(ours.mask_mod(0, 0, order[:, None], order[None]), dense_mask(layout, scope))
        # A pack of one block gets two, the second without a token, so that the compiled kernel takes it.
        length = max(layout.length, BLOCK + 1)

        def inside(batch, head, q, k, own=ours.mask_mod):
            held = (q < layout.length) & (k < layout.length)
            return held & own(batch, head, q.clamp(max=layout.length - 1), k.clamp(max=layout.length - 1))

        assert same_lists(ours, create_block_mask(inside, None, None, length, length, device="cpu"))
        assert ours.seq_lengths == (layout.length, layout.length) and ours.BLOCK_SIZE == (BLOCK, BLOCK)


class AllocatedBytes(TorchDispatchMode):
    """Adds up the bytes of all that is computed, as if none of it were ever freed."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self.total += leaf.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("length", [1_000, 8_000, 43_000])
def test_the_memory_of_a_block_mask_follows_tokens_and_blocks(length):
    """Of all that is ever allocated: 27 MB at 43,000 tokens, of which 1.8 MB are lists that stay; the whole
    mask takes 7 GB there.
    """
    layout = layout_of([(length // 10, [length // 50] * 5)] * 5)
    with AllocatedBytes() as allocated:
        mask = block_mask(layout, CPU)
    blocks = (-(-length // BLOCK)) ** 2
    kept = sum(x.nbytes for name in BlockMask._TENSOR_ATTRS if (x := getattr(mask, name)) is not None)
    assert layout.length == length
    assert kept <= 16 * blocks + 16 * -(-length // BLOCK)
    assert allocated.total <= 160 * blocks + 220 * length
    with AllocatedBytes() as whole:
        if length == 1_000:
            create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    assert length != 1_000 or whole.total > 4 * length**2


PACKS = [layout for layout in EDGES if layout.length > 1]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_one_compiled_kernel_serves_fifty_packs_and_equals_the_dense_one(dtype, tolerance):
    attention._flex_kernel.cache_clear()
    before = graphs()
    lengths = set()
    for layout in PACKS + [random_layout(seed, longest=300) for seed in range(45)]:
        query, key, value = inputs(layout, dtype)
        flex, dense = FlexPlan(layout, CPU), DensePlan(layout, CPU)
        with torch.no_grad():
            for layer in range(2):
                ours = flex.attend(layer, query, key, value)
            exact = dense.attend(0, query.float(), key.float(), value.float())
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), exact, rtol=tolerance, atol=tolerance)
        lengths.add(layout.length)
    assert len(lengths) > 40
    assert graphs() - before == 1


def with_gradients(plan, layout: Layout, dtype: torch.dtype = torch.float32, **options) -> list[torch.Tensor]:
    """The output, and the gradients of queries, keys and values."""
    leaves = [x.requires_grad_() for x in inputs(layout, dtype)]
    output = plan.attend(0, *leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs(layout, dtype)[0].flip(2))]


@pytest.mark.parametrize("scope", [PATH, *SCOPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tree_kernel_equals_the_dense_one_in_every_scope(scope, dtype):
    for seed in range(8):
        layout = with_images(random_layout(seed, longest=700 if seed < 2 else 100), seed)
        tree, dense = (
            with_gradients(plan(layout, CPU), layout, dtype, scope=scope, scale=0.3)
            for plan in (TreePlan, DensePlan)
        )
        torch.testing.assert_close(tree, dense, rtol=1e-5, atol=1e-5)


def test_trees_of_one_branch_need_no_second_block():
    layout = layout_of([(ALONE // 2, [ALONE]), (ALONE, [1]), (3, [5]), (ALONE - 1, [])])
    blocks = blocks_of(layout, PATH, CPU)
    assert not blocks.others
    assert [(s.start, s.stop) for s in blocks.alone] == [(0, 96), (96, 161)]
    assert sum(len(bucket.source) for bucket in blocks.together) == 8 + ALONE - 1


@pytest.mark.parametrize("seed", range(12))
def test_joined_segments_see_what_they_saw_apart(seed):
    layout = with_images(random_layout(seed, longest=60), seed)
    joined = layout.joined()
    followed = [segment.parent for segment in joined.segments if segment.parent is not None]
    assert all(followed.count(parent) > 1 for parent in followed)
    for scope in (PATH, *SCOPES):
        assert torch.equal(dense_mask(joined, scope), dense_mask(layout, scope))


@pytest.fixture
def traced(monkeypatch):
    """Kernels that are traced as for a GPU, backward pass included, and computed without a compiler."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # no gradients on a CPU
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    attention._flex_kernel.cache_clear()
    yield
    attention._flex_kernel.cache_clear()


def test_gradients_equal_the_dense_ones_with_at_most_six_graphs(traced):
    before = graphs()
    for index, layout in enumerate(PACKS + [random_layout(seed, longest=200) for seed in range(12)]):
        given, upstream = inputs(layout), inputs(layout)[0].flip(2)
        # All with gradients; none, as in the reference; and as adapters of queries and values have it.
        learns = ([True] * 3, [False] * 3, [True, False, True])[index % 3]
        results = []
        for plan in (FlexPlan(layout, CPU), DensePlan(layout, CPU)):
            leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(given, learns, strict=True)]
            output = plan.attend(0, *leaves)
            wanted = [x for x in leaves if x.requires_grad]
            grads = torch.autograd.grad(output, wanted, upstream) if wanted else ()
            results.append((output.detach(), *grads))
        for ours, dense in zip(*results, strict=True):
            torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            FlexPlan(layout, CPU).attend(0, *given)
    assert 1 < graphs() - before <= MAX_GRAPHS


def test_the_kernel_of_layers_with_windows_and_images_equals_the_dense_one(traced):
    before = graphs()
    for seed in range(12):
        layout = with_images(random_layout(seed, longest=200), seed)
        flex, dense = FlexPlan(layout, CPU), DensePlan(layout, CPU)
        for scope in SCOPES[seed % 2 :: 2]:
            ours, exact = (with_gradients(p, layout, scope=scope, scale=1.0) for p in (flex, dense))
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert graphs() - before == 1


def test_every_shape_of_heads_has_its_own_limit(traced, monkeypatch):
    monkeypatch.setattr(attention, "MAX_GRAPHS", 1)
    layout = EDGES[3]
    with torch.no_grad():
        for heads in (1, 2, 4):
            query, _, _ = inputs(layout)
            FlexPlan(layout, CPU).attend(0, query, query[:, :heads], query[:, :heads])


def test_a_kernel_that_would_be_compiled_without_end_stops_the_run(traced, monkeypatch):
    monkeypatch.setattr(attention, "MAX_GRAPHS", 1)
    plan, given = FlexPlan(EDGES[3], CPU), inputs(EDGES[3])
    with torch.no_grad():
        plan.attend(0, *given)
    with pytest.raises(
        TrainingError, match=r"model.attention=flex: .* compiled 1 times already[\s\S]*=dense"
    ):
        plan.attend(0, *[x.requires_grad_() for x in given])


def test_a_kernel_that_cannot_be_compiled_is_reported(monkeypatch):
    def broken(graph, example_inputs):
        raise OSError("no C compiler found\nin 40 lines")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    attention._flex_kernel.cache_clear()
    with (
        torch.no_grad(),
        pytest.raises(TrainingError, match=r"cannot be compiled: .*no C compiler found in 40"),
    ):
        FlexPlan(EDGES[3], CPU).attend(0, *inputs(EDGES[3]))
    attention._flex_kernel.cache_clear()


def test_a_kernel_is_never_run_uncompiled():
    with torch.compiler.set_stance("force_eager"), pytest.raises(TrainingError, match="switched off"):
        FlexPlan(EDGES[3], CPU).attend(0, *inputs(EDGES[3]))
