"""Computes logprobs and entropies of the branch tokens of packs.

The vocabulary of a real model is about 152,000 wide: logits are computed for the tokens that have
a target only, in chunks that are recomputed in the backward pass where there are several, never for the
prompt and never all at once, and once for answers that share a token. Letters in shapes: L tokens, N target
tokens, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlcs.model import attention
from rlcs.model.chunks import LOGIT_CHUNK
from rlcs.model.experts import Routing, load_balance, replay
from rlcs.model.image_features import image_inputs
from rlcs.model.linear_logprobs import linear_logprobs
from rlcs.model.packing import Pack
from rlcs.model.vlm import Vlm


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Logprobs (N,) of every target token under the policy, and entropies (N,), by default without gradient.

    `router_loss` (N,) is that of the token's tree (`experts.load_balance`) times its weight, if it has one.
    """

    logprobs: Tensor
    entropy: Tensor
    router_loss: Tensor | None = None


def hidden_states(vlm: Vlm, ids: Tensor, positions: Tensor, *, plan: attention.Plan, **images: Any) -> Tensor:
    """Compute the last hidden states (L, C) of one flat sequence with the model's public forward.

    ids (L,), positions (3, L); `images` are those of `image_inputs`, and `routing` of a mixture of experts.
    """
    output = vlm.model.base_model(
        input_ids=ids[None],
        position_ids=vlm.family.position_ids(positions),
        use_cache=False,
        plan=plan,
        **images,
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def score(
    vlm: Vlm,
    pack: Pack,
    *,
    temperature: float = 1.0,
    routing: Routing | None = None,
    entropy_gradient: bool = False,
) -> Scores:
    """Compute logprobs and entropies of all branch tokens of a pack, at a sampling temperature.

    With `entropy_gradient` entropies have a gradient, too; then the backward pass takes more memory.

    In a mixture of experts `routing` replays and records what computes which token; None: the pack's experts
    are replayed, where it has them.
    """
    if routing is None and pack.routes is not None:
        routing = replay(vlm.model, pack.routes)
    pack = pack.to(vlm.device)
    plan = attention.make_plan(vlm.attention, pack.layout, vlm.device)
    balances = bool(vlm.router_loss) and torch.is_grad_enabled()
    if routing is None and balances:
        routing = Routing()
    routed = {} if routing is None else {"routing": routing}

    def work() -> tuple[Tensor, ...]:
        # No name holds the pixels, so that they are gone before the logits come.
        states = hidden_states(vlm, pack.ids, pack.positions, plan=plan, **routed, **image_inputs(vlm, pack))
        found = logprobs(states)
        if not balances:
            return found
        assert routing is not None
        losses, tree = load_balance(routing, pack.layout)
        return *found, vlm.router_loss * losses[tree[pack.predictors]]

    def logprobs(states: Tensor) -> tuple[Tensor, Tensor]:
        head = vlm.model.get_output_embeddings()
        chunk = max(1, LOGIT_CHUNK // head.weight.shape[0])
        if vlm.fused_loss:
            assert getattr(head, "bias", None) is None, "no family's head has a bias"
            return linear_logprobs(
                states[pack.predictors],
                head.weight,
                pack.targets,
                temperature=temperature,
                softcap=vlm.softcap,
                rows=chunk,
                entropy_gradient=entropy_gradient,
            )
        settings = (vlm.logits, temperature, entropy_gradient)
        chunks = list(zip(pack.predictors.split(chunk), pack.targets.split(chunk), strict=True))
        if len(chunks) == 1:  # small enough to be kept until the backward pass, which begins here
            return _score_chunk(states[chunks[0][0]], chunks[0][1], *settings)
        parts = [
            checkpoint(_score_chunk, states[rows], targets, *settings, use_reentrant=False)
            for rows, targets in chunks
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    chosen, entropy, *rest = (pack.of_targets(each) for each in vlm.run(work))
    return Scores(logprobs=chosen, entropy=entropy, router_loss=rest[0] if rest else None)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _score_chunk(
    states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    # No name holds the logits while what follows takes as much memory once more.
    log_probs = torch.log_softmax(_scaled(head(states).float(), temperature), dim=-1)
    chosen = log_probs.gather(1, targets[:, None])[:, 0]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return chosen, entropy
