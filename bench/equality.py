"""Do both sides compute the same thing? Loss and gradients on the same answers, before any timing.

Without this a ratio of seconds would mean nothing.
"""

from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bench import ours, peer
from bench.shapes import SEED, Case, grpo_settings
from rlcs.model.packing import Pack, pack
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt
from rlcs.records.trees import Branch, Tree
from rlcs.train.context import GrpoContext
from rlcs.train.learning import make_objective
from rlcs.train.losses import denominator
from rlcs.train.trainer import Batch, logprobs_of

TOLERANCE = 1e-4
"""Largest relative difference in fp32."""


def main(pipe: Connection, case: Case) -> None:
    """Send {"loss", "peer_loss", "loss_gap", "gradient_gap", "worst_gradient_gap"}."""
    torch.set_num_threads(case.threads)
    disable_progress_bar()
    trainer: Any = peer.make_trainer(case)
    trainer.case = case
    vlm, context = ours.load(case)
    assert context.reference is not None, "the penalty needs a reference"
    move_apart(trainer.ref_model, context.reference)
    answers = drawn_answers(case)
    trainer._generate_single_turn = lambda *args, **kwargs: ([list(a) for a in answers], None)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([dataset_row(case, i) for i in range(len(answers))])
    # The moved reference also stands for the sampling policy, so that ratios leave 1 and clips act.
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"]
    trainer.current_gradient_accumulation_steps = case.packs
    trainer.args.steps_per_generation = case.packs
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    packed = packed_like(case, context, inputs, answers)
    our_loss = backward(vlm, context, packed, case)
    result = {"peer_loss": loss.item(), "loss": our_loss}
    result["loss_gap"] = abs(our_loss - loss.item()) / abs(loss.item())
    pipe.send(result | gradient_gaps(vlm, trainer.model))


def move_apart(peer_reference: Any, reference: Vlm) -> None:
    """Give both references the same noise."""
    generator = torch.Generator().manual_seed(SEED)
    state = peer_reference.state_dict()
    with torch.no_grad():
        for name, parameter in reference.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.mul_(1.0 + 0.02 * noise)
            state[name].copy_(parameter)


def drawn_answers(case: Case) -> list[tuple[int, ...]]:
    """Random ids of the forced lengths, group after group."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [n for problem in case.step_problems(1) for n in case.lengths[problem.id]]
    return [tuple(torch.randint(20, 300, (n,), generator=generator).tolist()) for n in lengths]


def dataset_row(case: Case, index: int) -> dict[str, Any]:
    """Row `index` of TRL's batch: every problem G times."""
    return peer.dataset_row(case, case.step_problems(1)[index // case.shape.group])


def packed_like(
    case: Case, context: GrpoContext, inputs: dict[str, Any], answers: list[tuple[int, ...]]
) -> Pack:
    """The same answers and TRL's own advantages as trees; the prompts must have the same ids."""
    trees = []
    group = case.shape.group
    for place, problem in enumerate(case.step_problems(1)):
        prompt = context.chat.prompt(problem)
        require_same_prompt(prompt, inputs["prompt_ids"][place * group], inputs["prompt_mask"][place * group])
        rows = range(place * group, (place + 1) * group)
        branches = [
            Branch(ids=answers[row], weights=(inputs["advantages"][row].item(),) * len(answers[row]))
            for row in rows
        ]
        trees.append(Tree(prompt=prompt, branches=tuple(branches)))
    return pack(trees, context.chat.patches)


def require_same_prompt(prompt: Prompt, ids: Tensor, mask: Tensor) -> None:
    """Both sides read a problem as the same tokens."""
    assert prompt.ids == tuple(ids[mask.bool()].tolist()), f"prompt {prompt.problem_id} differs"


def backward(vlm: Vlm, context: GrpoContext, packed: Pack, case: Case) -> float:
    """Our loss, with its gradients left on the parameters."""
    settings = grpo_settings(case)
    assert context.reference is not None, "the penalty needs a reference"
    reference = logprobs_of(context.reference, [packed], temperature=settings.temperature)[0]
    batch = Batch(pack=packed, old_logprobs=reference, ref_logprobs=reference)
    vlm.model.train()
    sums = make_objective(settings)(batch, score(vlm, packed, temperature=settings.temperature))
    divisor = denominator(
        settings.loss_average, tokens=int(sums.tokens), sequences=int(sums.sequences), packs=1
    )
    loss = sums.loss / divisor
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    return loss.item()


def gradient_gaps(vlm: Vlm, other: Any) -> dict[str, float]:
    """Relative distance of all gradients, and of the worst parameter (of one with a real gradient)."""
    theirs = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    gaps, norms = [], []
    for name, parameter in vlm.parameters():
        grad = parameter.grad
        assert grad is not None, f"{name} has no gradient"
        gaps.append((grad - theirs[name]).norm())
        norms.append(theirs[name].norm())
    gap, norm = torch.stack(gaps), torch.stack(norms)
    total = norm.norm()
    return {
        "gradient_gap": float(gap.norm() / total),
        "worst_gradient_gap": float((gap / norm.clamp(min=1e-3 * float(total))).max()),
    }
