"""What a policy loss takes, from a pack and what the policy makes of it."""

from rlcs.model.policy import Scores
from rlcs.train.losses import LossInputs, truncated_importance
from rlcs.train.trainer import Batch


def inputs_of(batch: Batch, scores: Scores, cap: float | None, entropy_weight: float = 0.0) -> LossInputs:
    """The inputs of the loss of a batch; without old logprobs the policy has not moved yet.

    `cap` bounds the importance weights that correct for differences between the sampler's logprobs and the
    policy's; None: no correction. `entropy_weight` is that of a bonus for entropy.
    """
    device = scores.logprobs.device
    old = scores.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs.to(device)
    sampler = batch.pack.sampler_logprobs
    sampler = None if sampler is None else sampler.to(device)
    return LossInputs(
        logprobs=scores.logprobs,
        old_logprobs=old,
        advantages=batch.pack.weights.to(device),
        sequence=batch.pack.sequence.to(device),
        ref_logprobs=batch.ref_logprobs,
        router_loss=scores.router_loss,
        sampler_logprobs=sampler,
        held=None if batch.pack.held is None else batch.pack.held.to(device),
        entropy_bonus=entropy_weight * scores.entropy if entropy_weight else None,
        importance=None if sampler is None or cap is None else truncated_importance(old, sampler, cap),
    )
