"""Compares packed logprobs with plain ones, on the model and data of the run.

The first step of every training stage calls this; a mismatch stops the run before it trains on wrong
logprobs. What is wrong with a pack (a position, a predictor, a key that a token must not see) may move the
logprobs of a trained model by 0.001 nats, and bfloat16 alone moves them by 0.01. So a model in lower
precision is compared twice: as it is, and in float32, each weight cast while its layer computes.

How far apart they may be is measured: by the difference of two plain kernels on the same weights and data.
In a mixture of experts rounding also changes which of two nearly equal experts a router chooses, and with it
logprobs by far more: there all passes are computed by the experts that the pack chose.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rlcs.errors import TrainingError
from rlcs.model import attention, delta_net
from rlcs.model.chat import Chat
from rlcs.model.experts import Routing
from rlcs.model.layout import PATH, Layout, Scope, Segment, dense_mask
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.records.trees import Tree

FACTOR = 3.0
"""Packed and plain logprobs may differ this many times as much as those of two plain kernels."""

SMALLEST_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""A difference (nats, see `gap`) that is accepted in any case; a fault of one kernel alone is far larger."""

FEW_TOKENS = 4.0
"""Where a tree has n tokens to compare, 1 + this / sqrt(n) times as much is allowed: most of the rounding is
in few tokens, so that of one token says little about that of another, and an answer may have no more."""

OTHER_CHUNK = 16
"""Tokens of a chunk of the second plain kernel of recurrent layers; the first has 64."""

MAX_TREES, MAX_BRANCHES, MAX_ANSWER, MAX_TOKENS = 4, 4, 512, 16_384
"""How much a rank compares: trees, branches of each, tokens of a branch, and tokens of the pack."""

T = TypeVar("T")

MakePlan = Callable[[Layout, torch.device], attention.Plan] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far packed logprobs are from plain ones, and how far they may be (nats): where it is worst."""

    gap: float = 0.0
    limit: float = math.inf
    problem_id: str = ""
    precision: str = ""

    @property
    def share(self) -> float:
        """The gap as a share of what is allowed; above 1 is a fault, as are logprobs that are no numbers."""
        return self.gap / self.limit if math.isfinite(self.gap) else math.inf


def gap(differences: Tensor, dtype: torch.dtype) -> float:
    """Reduce the differences (tokens,) of two computations of the same logprobs to one number, in nats.

    In float32 it is the largest difference of a token. In lower precision it is the mean: there rounding
    alone moves single tokens by more than half a nat, but a broken kernel moves all tokens of an answer.
    """
    sizes = differences.abs().float()
    if not sizes.numel():
        return 0.0
    found = float(sizes.max() if dtype == torch.float32 else sizes.mean())
    return found if math.isfinite(found) else math.inf


@torch.no_grad()
def agreement(
    vlm: Vlm, chat: Chat, trees: Sequence[Tree], *, temperature: float = 1.0, shares_head: bool = False
) -> list[Agreement]:
    """Compare packed with plain logprobs of the targets of trees: one result for each precision.

    Plain means: every answer after a copy of the prompt, through the stock attention of transformers, with
    positions computed by the model itself.
    """
    vlm.model.eval()
    trees = _sample([tree for tree in trees if tree.branches])
    if not trees:
        return [Agreement()]
    native = vlm.model.get_output_embeddings().weight.dtype
    found = [_compare(vlm, chat, trees, native, temperature, shares_head)]
    if native != torch.float32:
        with _in_float32(vlm.model):
            found.append(_compare(vlm, chat, trees, torch.float32, temperature, shares_head))
    return found


def _sample(trees: Sequence[Tree]) -> list[Tree]:
    """Trees from the longest prompt to the shortest, with all branches where they fit into the pack."""
    chosen: list[Tree] = []
    left = MAX_TOKENS
    for tree in _spread(sorted(trees, key=lambda tree: -len(tree.prompt.ids)), MAX_TREES):
        followed = {branch.parent for branch in tree.branches}
        branches = [
            replace(b, logprobs=None)
            if index in followed
            else replace(b, ids=b.ids[:MAX_ANSWER], weights=b.weights[:MAX_ANSWER], logprobs=None)
            for index, b in enumerate(tree.branches)
        ]
        short = replace(tree, branches=tuple(branches))
        if short.num_tokens > left:
            short = _only(short, _spread(range(len(branches)), MAX_BRANCHES))
        if not chosen or short.num_tokens <= left:
            chosen.append(short)
            left -= short.num_tokens
    return chosen


def _only(tree: Tree, branches: Sequence[int]) -> Tree:
    """The tree with these branches, and those that they follow."""
    kept = sorted({index for branch in branches for index in tree.path(branch)})
    numbers: dict[int | None, int | None] = {None: None} | {old: new for new, old in enumerate(kept)}
    chosen = [replace(tree.branches[i], parent=numbers[tree.branches[i].parent]) for i in kept]
    return replace(tree, branches=tuple(chosen))


def _spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at most, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _compare(
    vlm: Vlm, chat: Chat, trees: Sequence[Tree], dtype: torch.dtype, temperature: float, shares_head: bool
) -> Agreement:
    together = pack(trees, chat.patches, keeps_features=True, shares_head=shares_head)
    counts = torch.bincount(together.sequence, minlength=together.num_sequences).tolist()
    routing = None if vlm.family.router is None else Routing()
    packed = iter(score(vlm, together, temperature=temperature, routing=routing).logprobs.split(counts))
    apart, noise, root = list[Tensor](), list[Tensor](), 0
    for tree in trees:
        of_tree = [next(packed) for _ in tree.branches]
        branches = _spread(range(len(tree.branches)), MAX_BRANCHES)
        paths = ([root, *(root + 1 + branch for branch in tree.path(i))] for i in branches)
        routes = [_chosen(routing, together.layout, path) for path in paths]
        root += 1 + len(tree.branches)
        plain_of = partial(_plain, vlm, chat, tree, temperature, list(zip(branches, routes, strict=True)))
        with attention_of(vlm, "sdpa"):
            plain = plain_of(None)
        with attention_of(vlm, attention.NAME, _EXPLICIT):
            other = plain_of(_ExplicitPlan)
        apart.append(torch.cat([of_tree[i] for i in branches]) - plain)
        noise.append(other - plain)
    smallest = SMALLEST_LIMIT.get(dtype, SMALLEST_LIMIT[torch.bfloat16])
    everywhere = gap(torch.cat(noise), dtype)
    results = []
    for tree, differences, of_kernels in zip(trees, apart, noise, strict=True):
        measured = filter(math.isfinite, (everywhere, gap(of_kernels, dtype)))
        limit = max([smallest, *(FACTOR * one for one in measured)])
        results.append(
            Agreement(
                gap=gap(differences, dtype),
                limit=limit * (1 + FEW_TOKENS / math.sqrt(max(1, len(differences)))),
                problem_id=tree.prompt.problem_id,
                precision=str(dtype).removeprefix("torch."),
            )
        )
    return max(results, key=lambda one: one.share)


def _plain(
    vlm: Vlm,
    chat: Chat,
    tree: Tree,
    temperature: float,
    branches: Sequence[tuple[int, Tensor | None]],
    plan: MakePlan,
) -> Tensor:
    """The `plain_logprobs` of some branches, each with its `routes`."""
    return torch.cat(
        [plain_logprobs(vlm, chat, tree, i, temperature, plan=plan, routes=given) for i, given in branches]
    )


def _chosen(routing: Routing | None, layout: Layout, segments: Sequence[int]) -> Tensor | None:
    """The experts that computed the tokens of these segments of a pack, if the model has any."""
    if routing is None:
        return None
    table, spans = routing.table(), [layout.segments[index] for index in segments]
    return torch.cat([table[span.start : span.stop] for span in spans])


_EXPLICIT = "rlcs_explicit"


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None
) -> Tensor:
    """Attention written out: scores, softmax and sum, for some queries at a time.

    `visible` is true where a query (second last axis) may see a key (last axis); None: everywhere.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = []
    for rows in torch.arange(query.shape[2], device=query.device).split(512):
        scores = (query[:, :, rows] @ key.transpose(2, 3)).float() * (scale or query.shape[-1] ** -0.5)
        if visible is not None:
            scores.masked_fill_(~visible[..., rows, :], -math.inf)
        parts.append(scores.softmax(-1).to(value.dtype) @ value)
    return torch.cat(parts, dim=2)


class _ExplicitPlan:
    """What tokens of one sequence see, written out."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """`layout` is one segment."""
        self.recurrence = _ExplicitRecurrence()
        self._visible = cache(lambda scope: dense_mask(layout, scope).to(device))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scope: Scope = PATH,
        scale: float | None = None,
    ) -> Tensor:
        """Attention written out."""
        return _explicit(query, key, value, self._visible(scope), scale)


class _ExplicitRecurrence:
    """Recurrent layers over one sequence: transformers' own code, in other chunks than it computes by itself.

    Nothing of `model.delta_rule`, which is compared.
    """

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """See `Recurrence`."""
        before = torch.cat([x.new_zeros(weight.shape[1] - 1, x.shape[1]), x]).float()
        taps = [before[i : i + len(x)] * weight[:, i].float() for i in range(weight.shape[1])]
        return torch.stack(taps).sum(0).to(x.dtype)

    def recur(self, layer: int, inputs: Sequence[Tensor]) -> Tensor:
        """See `Recurrence`."""
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        kernel: Any = inspect.unwrap(torch_chunk_gated_delta_rule)  # not a faster one in its place
        query, key, value, g, beta = (x[None] for x in inputs)
        per_key = value.shape[2] // key.shape[2]  # repeated, for versions before 5.20 do not
        query, key = (x.repeat_interleave(per_key, 2) for x in (query, key))
        output: Tensor = kernel(
            query, key, value, g=g, beta=beta, chunk_size=OTHER_CHUNK, use_qk_l2norm_in_kernel=True
        )[0]
        return output[0]


def _explicit_vision(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The vision tower's attention over one window or, with a mask, over padded images."""
    return _explicit(query, key, value, attention_mask, kwargs.get("scaling")).transpose(1, 2), None


def plain_logprobs(
    vlm: Vlm,
    chat: Chat,
    tree: Tree,
    index: int,
    temperature: float = 1.0,
    *,
    plan: MakePlan = None,
    routes: Tensor | None = None,
) -> Tensor:
    """Logprobs (N,) of the targets in the trunk and in one branch of a tree, in a sequence of its own.

    To be called within `attention_of`; `plan` makes one for the attention that needs it. `routes` are the
    experts that compute the sequence; None: its own routers choose.
    """
    prompt, answer = tree.prompt, tree.branches[index].ids
    earlier = (i for branch in tree.path(index)[:-1] for i in tree.branches[branch].ids)
    whole = (*prompt.ids, *earlier, *answer)
    targets = [*tree.trunk_targets, *range(len(whole) - len(answer), len(whole))]
    predictors = torch.tensor(targets, device=vlm.device) - 1
    ids = torch.tensor([whole], device=vlm.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= vlm.family.text_inputs(ids, prompt.image_token_id)
    if prompt.images:
        pixels = [chat.patches(image).to(vlm.device, vlm.model.dtype) for image in prompt.images]
        inputs |= vlm.family.vision_inputs(pixels, torch.tensor(prompt.grids, device=vlm.device))
    if plan is not None:
        segments = (Segment(start=0, stop=len(whole)),)
        inputs["plan"] = plan(Layout(segments=segments, images=prompt.spans), vlm.device)
    if routes is not None:
        inputs["routing"] = Routing(routes)
    logits = vlm.model(**inputs, use_cache=False, logits_to_keep=predictors).logits[0]
    return torch.log_softmax(logits.float() / temperature, -1).gather(1, ids[0, targets, None])[:, 0]


@contextmanager
def attention_of(vlm: Vlm, text: str, vision: str = "") -> Iterator[None]:
    """Attend by this attention of transformers, and in the vision tower by another if it is named."""
    AttentionInterface.register(_EXPLICIT, _explicit_vision)
    AttentionMaskInterface.register(_EXPLICIT, sdpa_mask)
    vlm.model.set_attn_implementation({"text_config": text, "vision_config": vision or text})
    try:
        yield
    finally:
        vlm.family.install(vlm.model)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32: while a layer computes, its weights and inputs are copies in float32.

    Weights that are quantised stay as they are; rounding of their layers shows in both plain kernels.
    """
    kept: dict[nn.Module, list[tuple[nn.Module, dict[str, nn.Parameter]]]] = {}

    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A gated delta net reads the weight of its convolution, and does not call it.
        owners = [module]
        if isinstance(module, delta_net.FollowsPaths):
            owners += [child for name, child in module.named_children() if name == "conv1d"]
        kept[module] = [(own, {n: p for n, p in own._parameters.items() if p is not None}) for own in owners]
        for own, parameters in kept[module]:
            own._parameters.update({name: cast(parameter) for name, parameter in parameters.items()})
        return tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for own, parameters in kept.pop(module, []):
            own._parameters.update(parameters)

    with ExitStack() as hooks:
        for module in model.modules():
            direct = module.parameters(recurse=False)
            if any(p.dtype in (torch.bfloat16, torch.float16) for p in direct):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def require_agreement(
    vlm: Vlm, chat: Chat, trees: Sequence[Tree], *, temperature: float = 1.0, shares_head: bool = False
) -> Agreement:
    """Raise TrainingError on every rank if packed and plain logprobs disagree on one; else return the worst.

    Every rank compares some of its trees, if it has any, packed as training packs them (`shares_head`).
    """
    with vlm.gathered():
        own = agreement(vlm, chat, trees, temperature=temperature, shares_head=shares_head)
    ranks = vlm.world.gather(own)
    worst = max((one for of_rank in ranks for one in of_rank), key=lambda one: one.share)
    if worst.share > 1:
        raise TrainingError(
            f"packed and plain logprobs differ by {worst.gap:.2g} nats in {worst.precision}, allowed are "
            f"{worst.limit:.2g} (from two plain kernels), with attention {vlm.attention!r}",
            where=worst.problem_id,
            fix="please report this with your versions of torch and transformers (`rlcs doctor`); "
            "if model.attention=dense passes, you can train with that meanwhile",
        )
    return worst
