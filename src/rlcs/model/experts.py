"""Mixtures of experts: which experts compute each token, and the loss that keeps their load even.

A layer's router gives each token a score for every expert; the few with the highest compute it. That depends
on the token alone, so that a pack is as exact here as elsewhere, up to rounding: where two scores are nearly
equal, any other rounding may choose another expert, which then changes a logprob by far more than it. So a
`Routing` records what was chosen, and replays it: in another pass of the same tokens (`parity_check`), or in
training as the engine chose in sampling ("Rollout Routing Replay", arXiv 2510.11370).

Letters in shapes: L tokens of the pack, E experts, k of them for each token, T trees.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlcs.errors import TrainingError
from rlcs.model.layout import Layout


class Routing:
    """The routers' choices in one forward pass.

    `given` (L, layers, k) are ids of experts to compute with; below zero, and without it, a token's own
    router chooses. In either case an expert's weight is by the router's scores now, and has their gradient.
    """

    def __init__(self, given: Tensor | None = None) -> None:
        """Nothing is chosen before the forward pass."""
        self._given = given
        self.logits: dict[int, Tensor] = {}
        self.chosen: dict[int, Tensor] = {}

    def route(self, layer: int, logits: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of the experts (L, k) of one layer, from its router's scores (L, E) and own two."""
        if self._given is not None:
            given = self._given[:, layer].to(chosen, non_blocking=True)
            chosen = torch.where(given[:, :1] < 0, chosen, given)
            # As transformers' router computes them of those that it chose.
            shares = logits.softmax(-1, dtype=torch.float).gather(1, chosen)
            weights = (shares / shares.sum(-1, keepdim=True)).to(weights.dtype)
        if layer not in self.chosen:  # not again where the layer is recomputed in the backward pass
            self.logits[layer], self.chosen[layer] = logits, chosen
        return weights, chosen

    def table(self, layers: int = 0) -> Tensor:
        """All ids that were chosen (L, layers, k), zero in a layer without experts.

        At least up to the last layer with experts.
        """
        some, count = next(iter(self.chosen.values())), max(layers, *(i + 1 for i in self.chosen), 0)
        return torch.stack([self.chosen.get(i, torch.zeros_like(some)) for i in range(count)], dim=1)


def replay(model: PreTrainedModel, routes: Tensor) -> Routing:
    """Replay the experts (L, layers, k) that computed a pack's tokens in sampling.

    Raises TrainingError for experts that the model does not have, or not so many.
    """
    text: Any = model.config.get_text_config()
    shape = (text.num_hidden_layers, text.num_experts_per_tok)
    with_experts = [
        i for i, one in enumerate(model.base_model.language_model.layers) if hasattr(one.mlp, "gate")
    ]
    known = routes[routes[:, 0, 0] >= 0]
    right = known.shape[1:] == shape
    if right:
        order = known[:, with_experts].sort(-1).values
        right = bool((order < text.num_experts).all() and (order.diff(dim=-1) > 0).all())
    if not right:
        raise TrainingError(
            f"the engine chose other experts than the {shape[1]} of {text.num_experts} in {shape[0]} layers "
            "that this model has for each token",
            where="rollout.router_replay",
            fix="set it to false, and report this with your version of vLLM",
        )
    return Routing(routes)


class _FollowsRouting(nn.Module):
    """A router of transformers with another forward; never made, but set as the class of one."""

    layer: int
    routing: Routing | None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (L, hidden) to scores (L, E), and weights and ids (L, k) of the chosen experts."""
        logits, weights, chosen = super().forward(hidden_states)
        routing, self.routing = self.routing, None
        if routing is not None:
            weights, chosen = routing.route(self.layer, logits, weights, chosen)
        return logits, weights, chosen


def install(model: PreTrainedModel) -> None:
    """Make the routers of a model follow the keyword `routing` of its forward; without it they choose.

    The router has no keywords: a hook of what comes before it in the same layer, and has all, hands it over.
    The layer's own hooks would not run where it is recomputed for its gradients. Installing again changes
    nothing.
    """
    text: Any = model.base_model.language_model
    for index, layer in enumerate(text.layers):
        router = getattr(layer.mlp, "gate", None)
        if router is None or isinstance(router, _FollowsRouting):
            continue
        router.layer, router.routing = index, None
        router.__class__ = _following(type(router))  # type: ignore[arg-type]
        mixer = layer.self_attn if hasattr(layer, "self_attn") else layer.linear_attn
        mixer.register_forward_pre_hook(partial(_hand_over, router), with_kwargs=True)


def _hand_over(router: Any, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    router.routing = kwargs.pop("routing", None)
    return args, kwargs


@cache
def _following(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Routed{kind.__name__}", (_FollowsRouting, kind), {"__module__": __name__})


def load_balance(routing: Routing, layout: Layout) -> tuple[Tensor, Tensor]:
    """The load balancing loss (T,) of each tree, and the index (L,) of each token's tree.

    It is k where all experts get the same load, E at most:
    E * sum over experts of (share of tokens that chose it) * (its mean probability), over all layers (Switch
    Transformers, arXiv 2101.03961, equations 4 to 6), as the models' own code computes it of the batch in
    which every answer that nothing follows has its own copy of what it follows. Each tree is such a batch: so
    the loss does not depend on how trees were split over packs. A tree without answers has none: 0.
    """
    some = next(iter(routing.logits.values()))
    top_k = next(iter(routing.chosen.values())).shape[-1]
    copies, tree = (x.to(some.device) for x in _copies(layout))
    chose = torch.zeros(len(layout.trunks), some.shape[-1], device=some.device)
    probability = torch.zeros_like(chose)
    for logits in routing.logits.values():
        shares = logits.softmax(-1, dtype=torch.float)
        first = shares.detach().topk(top_k, -1).indices
        hits = torch.zeros_like(shares).scatter(1, first, copies[:, None].expand(-1, top_k))
        chose = chose.index_add(0, tree, hits)
        probability = probability.index_add(0, tree, shares * copies[:, None])
    rows = (chose.sum(-1, keepdim=True) / top_k).clamp(min=1)
    return chose.shape[-1] * (chose / rows * (probability / rows)).sum(-1), tree


def _copies(layout: Layout) -> tuple[Tensor, Tensor]:
    """For every token, in how many sequences of the repeated batch it is, and the index of its tree."""
    followed = {segment.parent for segment in layout.segments}
    copies, tree = [0.0] * len(layout.segments), list[int]()
    for index, segment in enumerate(layout.segments):
        tree.append(max(tree, default=-1) + 1 if segment.parent is None else tree[segment.parent])
        if index in followed or segment.parent is None:
            continue
        place: int | None = index
        while place is not None:
            copies[place] += 1
            place = layout.segments[place].parent
    sizes = torch.tensor([len(segment) for segment in layout.segments])
    return torch.tensor(copies).repeat_interleave(sizes), torch.tensor(tree).repeat_interleave(sizes)
