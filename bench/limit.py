"""How much faster sharing can be: floating point operations with every prompt G times and once.

Counted are the matrix products of the language model, its causal attention, the logits of answer
tokens, and the vision tower. Letters: P prompt tokens, R answer tokens, G answers.
"""

from dataclasses import dataclass
from typing import Any

from bench.shapes import Case
from rlcs.plan.skeleton import measure
from rlcs.plan.work import language, vision


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Operations without sharing over operations with it; `padded` also counts padding as work.

    `operations` are those of one forward pass over the trees of a step.
    """

    exact: float
    padded: float
    operations: float = 0.0


def limit_of(case: Case, config: Any) -> Limit:
    """The theoretical ratio of a forward pass, and so of a backward pass (twice a forward) and of a step.

    Prefill and decoding of a rollout do the operations of one forward pass over the same tokens.
    """
    sizes = measure(case.shape.model, config)
    shared = unshared = padded = 0.0
    for step in range(1, case.steps):
        problems = case.step_problems(step)
        longest_trunk = max(case.trunks[p.id] for p in problems)
        longest_answer = max(max(case.lengths[p.id]) for p in problems)
        for problem in problems:
            trunk, patches = case.trunks[problem.id], case.patches[problem.id]
            lengths = case.lengths[problem.id]
            image = vision(sizes.vision, patches)
            shared += image + language(sizes, trunk, lengths)
            for length in lengths:
                unshared += image + language(sizes, trunk, [length])
                padded += image + language(sizes, longest_trunk, [longest_answer])
    per_step = shared / (case.steps - 1)
    return Limit(exact=unshared / shared, padded=padded / shared, operations=per_step)
