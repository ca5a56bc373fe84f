"""Compares packed logprobs with plain ones, on the model and data of the run.

The first step of every training stage calls this; a mismatch stops the run before it trains on wrong
logprobs.
"""

import math

import torch

from rlcs.errors import TrainingError
from rlcs.model.chat import Chat
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.records import Tree

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest accepted gap (nats, see `gap`), by the model's number format."""


def gap(differences: torch.Tensor, dtype: torch.dtype) -> float:
    """Reduce the differences (tokens,) of two computations of the same logprobs to one number, in nats.

    In float32 it is the largest difference of a token. In lower precision it is the mean: there rounding
    alone moves single tokens by more than half a nat, but faults move every token of an answer.
    """
    sizes = differences.abs()
    return float(sizes.max() if dtype == torch.float32 else sizes.mean())


@torch.no_grad()
def disagreement(vlm: Vlm, chat: Chat, tree: Tree) -> float:
    """Compute the largest gap (nats) between packed and plain logprobs of the targets of one tree.

    Plain means: every answer after a copy of the prompt, through the stock attention of
    transformers, with positions computed by the model itself.
    """
    vlm.model.eval()
    dtype = vlm.model.get_output_embeddings().weight.dtype
    plain = [_plain_logprobs(vlm, chat, tree, index) for index in range(len(tree.branches))]
    packed = score(vlm, pack([tree], chat.patches)).logprobs.split([len(logprobs) for logprobs in plain])
    gaps = [gap(ours - reference, dtype) for ours, reference in zip(packed, plain, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


def _plain_logprobs(vlm: Vlm, chat: Chat, tree: Tree, index: int) -> torch.Tensor:
    prompt, answer = tree.prompt, tree.branches[index].ids
    whole = (*prompt.ids, *answer)
    targets = torch.tensor([*tree.trunk_targets, *range(len(prompt.ids), len(whole))], device=vlm.device)
    ids = torch.tensor([whole], device=vlm.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == prompt.image_token_id).long()
    if prompt.images:
        pixels = torch.cat([chat.patches(image) for image in prompt.images])
        inputs["pixel_values"] = pixels.to(vlm.device, vlm.model.dtype)
        inputs["image_grid_thw"] = torch.tensor(prompt.grids, device=vlm.device)
    chosen = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    try:
        logits = vlm.model(**inputs, use_cache=False, logits_to_keep=targets - 1).logits[0]
    finally:
        vlm.model.set_attn_implementation({"text_config": chosen})
    return torch.log_softmax(logits.float(), -1).gather(1, ids[0, targets, None])[:, 0]


def require_agreement(vlm: Vlm, chat: Chat, tree: Tree | None) -> float:
    """Raise TrainingError if packed and plain logprobs disagree; return the largest gap of all ranks.

    Every rank compares its tree, if it has one (else `tree` is None).
    """
    with vlm.gathered():
        gap_here = 0.0 if tree is None else disagreement(vlm, chat, tree)
        dtype = vlm.model.get_output_embeddings().weight.dtype
    largest = vlm.world.sum({"gap_max": gap_here})["gap_max"]
    if largest > TOLERANCE.get(dtype, 0.25):
        raise TrainingError(
            f"packed and plain logprobs differ by {largest:.2g} nats with attention {vlm.attention!r}",
            where="self-check" if tree is None else tree.prompt.problem_id,
            fix="set model.attention=dense, and please report this with your torch and transformers versions",
        )
    return largest
