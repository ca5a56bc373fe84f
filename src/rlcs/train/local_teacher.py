"""A teacher that is loaded beside the policy: a frozen model that scores the same packs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rlcs.errors import ModelError
from rlcs.model.packing import Pack
from rlcs.model.vlm import Vlm
from rlcs.train.trainer import logprobs_of

_IMAGES = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor")
"""What must be alike for two models to take the same patches."""
_WHERE = "grpo.teacher.model"


@dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """Scores packs as the reference of a KL penalty does: prompt and images once for each tree."""

    vlm: Vlm

    def logprobs(self, packs: Sequence[Pack], *, temperature: float) -> list[Tensor]:
        """See `TokenScorer`. Experts of its own compute the tokens, and its own vision tower the images."""
        own = [replace(pack, routes=None) for pack in packs]
        return logprobs_of(self.vlm, own, temperature=temperature)


def require_same_format(teacher: Vlm, student: Vlm) -> None:
    """Require that both read the same token ids and patches; the padding of vocabularies may differ.

    Raises ModelError.
    """
    if type(teacher.family) is not type(student.family):
        raise ModelError(
            f"the teacher is a {teacher.model.config.model_type}, the policy a "
            f"{student.model.config.model_type}: their prompts differ",
            where=_WHERE,
            fix="take a larger model of the same family",
        )
    first, second = (_vocabulary(vlm) for vlm in (teacher, student))
    if first != second:
        differing = sorted(first.items() ^ second.items())
        raise ModelError(
            f"the teacher's tokenizer is another one: {len(differing):,} entries differ, {differing[0][0]!r} "
            "among them",
            where=_WHERE,
            fix="take a model with the policy's tokenizer",
        )
    for name in _IMAGES:
        own, other = (getattr(vlm.processor.image_processor, name, None) for vlm in (teacher, student))
        if _plain(own) != _plain(other):
            raise ModelError(
                f"the teacher's images are prepared otherwise: its {name} is {own}, the policy's {other}",
                where=_WHERE,
                fix="take a larger model of the same family",
            )


def _vocabulary(vlm: Vlm) -> dict[str, Any]:
    """Ids of tokens, and the pieces of a text that has letters, digits, spaces and other scripts."""
    tokenizer = vlm.processor.tokenizer
    probe = "Let x_1 = 3.14159; the 2nd image shows\n\n  12,345 größe 日本語 \\boxed{42}."
    return {**tokenizer.get_vocab(), "pieces of a text": tuple(tokenizer(probe)["input_ids"])}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
