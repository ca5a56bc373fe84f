"""A fast path proves itself: packed logprobs against plain ones, on the run's own model and data.

The first step of every training stage calls this; a mismatch stops the run before it can teach
anything wrong.
"""

import math

import torch

from rlcs.chat import Chat
from rlcs.errors import TrainingError
from rlcs.models import Vlm
from rlcs.packing import pack
from rlcs.policy import score
from rlcs.records import Tree

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest accepted difference of one logprob (nats), by the model's number format."""


@torch.no_grad()
def largest_difference(vlm: Vlm, chat: Chat, tree: Tree) -> float:
    """The largest |packed - plain| logprob (nats) over the branch tokens of one tree.

    Plain means: every answer behind its own copy of the prompt, through the stock attention of
    transformers, with positions computed by the model itself.
    """
    vlm.model.eval()
    packed = score(vlm, pack([tree], chat.patches)).logprobs
    plain = torch.cat([_plain_logprobs(vlm, chat, tree, index) for index in range(len(tree.branches))])
    return float((packed - plain).abs().max())


def _plain_logprobs(vlm: Vlm, chat: Chat, tree: Tree, index: int) -> torch.Tensor:
    prompt, answer = tree.prompt, tree.branches[index].ids
    ids = torch.tensor([[*prompt.ids, *answer]], device=vlm.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == prompt.image_token_id).long()
    if prompt.images:
        pixels = torch.cat([chat.patches(image) for image in prompt.images])
        inputs["pixel_values"] = pixels.to(vlm.device, vlm.model.dtype)
        inputs["image_grid_thw"] = torch.tensor(prompt.grids, device=vlm.device)
    chosen = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    try:
        logits = vlm.model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    finally:
        vlm.model.set_attn_implementation({"text_config": chosen})
    targets = torch.tensor(answer, device=vlm.device)
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def require_agreement(vlm: Vlm, chat: Chat, tree: Tree | None) -> float:
    """Raise TrainingError if packed and plain logprobs disagree; returns the largest difference.

    Every rank tries a tree of its own, if it has one (`tree` is None where it has not).
    """
    with vlm.gathered():
        own = 0.0 if tree is None else largest_difference(vlm, chat, tree)
        dtype = vlm.model.get_output_embeddings().weight.dtype
    difference = vlm.mesh.sum({"difference_max": own if math.isfinite(own) else math.inf})["difference_max"]
    if not difference <= TOLERANCE.get(dtype, 0.25):
        raise TrainingError(
            f"packed and plain logprobs differ by {difference:.2g} nats with attention {vlm.attention!r}",
            where="self-check" if tree is None else tree.prompt.problem_id,
            fix="set model.attention=dense, and please report this with your torch and transformers versions",
        )
    return difference
