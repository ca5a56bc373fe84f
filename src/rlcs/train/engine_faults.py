"""Faults that an engine may have, as what the trainer would compute with the same fault.

Where an engine's numbers are those of the trainer with other pixels, positions or weights, that is what is
wrong with the engine. Letters in shapes: N answer tokens, K candidates for each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from rlcs.data.images import encode, image_from_bytes
from rlcs.model import attention
from rlcs.model.chat import Chat
from rlcs.model.chunks import LOGIT_CHUNK
from rlcs.model.image_features import image_inputs
from rlcs.model.packing import Pack, pack
from rlcs.model.policy import hidden_states
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt
from rlcs.records.trees import Tree

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Layer = Literal["ids", "grid", "pixels", "positions", "weights", "kernel"]
"""What an engine may have wrong, in the order in which a prompt passes through it."""

ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8, "fp8": 2.0**-5}
"""By how much, relative to its size, a layer's output differs between two kernels of a number format: its
rounding, and in float32 that of sums in another order. In FP8 weights and inputs are both rounded, to four
significant bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """What a model computes for some answers: logprobs (N, K) of the candidates in place of each token.

    `banned` (N,) is what each logprob gains where ids that may not be sampled are left out.
    """

    logprobs: Tensor
    banned: Tensor


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Computes as the trainer does, in packs of at most `budget` tokens where more than one tree fits."""

    vlm: Vlm
    chat: Chat
    budget: int
    temperature: float
    banned_ids: Sequence[int]

    @torch.no_grad()
    def __call__(
        self,
        trees: Sequence[Tree],
        candidates: Tensor,
        *,
        changed: Callable[[Pack], Pack] = lambda one: one,
        reference_mode: bool = False,
    ) -> Computed:
        """Logprobs of candidates (N, K) for the answers of trees; all ranks call it together."""
        vlm = replace(self.vlm, reference_mode=reference_mode)
        was_training = vlm.model.training
        vlm.model.eval()
        found, start = list[Tensor](), 0
        try:
            for some in self._packed(trees):
                one = changed(pack(some, self.chat.patches)).to(vlm.device)
                wanted = candidates[start : start + one.num_targets].to(vlm.device)
                start += one.num_targets
                with vlm.scoring():
                    found.append(self._pass(vlm, one, wanted).float().cpu())
        finally:
            vlm.model.train(was_training)
        values = torch.cat(found)
        return Computed(logprobs=values[:, :-1], banned=-torch.log1p(-values[:, -1].clamp(max=0.999)))

    def _packed(self, trees: Sequence[Tree]) -> Iterator[list[Tree]]:
        """The trees in their order, in runs that fit."""
        some: list[Tree] = []
        for tree in trees:
            if some and sum(each.num_tokens for each in (*some, tree)) > self.budget:
                yield some
                some = []
            some.append(tree)
        yield some

    def _pass(self, vlm: Vlm, one: Pack, candidates: Tensor) -> Tensor:
        """Logprobs of candidates, and the probability of all banned ids (N, K + 1)."""
        plan = attention.make_plan(vlm.attention, one.layout, vlm.device)

        def work() -> Tensor:
            states = hidden_states(vlm, one.ids, one.positions, plan=plan, **image_inputs(vlm, one))
            chunk = max(1, LOGIT_CHUNK // vlm.model.get_output_embeddings().weight.shape[0])
            parts = []
            for rows, wanted in zip(
                states[one.predictors].split(chunk), candidates.split(chunk), strict=True
            ):
                logprobs = torch.log_softmax(vlm.logits(rows).float() / (self.temperature or 1.0), dim=-1)
                of_banned = logprobs[:, list(self.banned_ids)].exp().sum(1, keepdim=True)
                parts.append(torch.cat([logprobs.gather(1, wanted), of_banned], dim=1))
            return torch.cat(parts)

        return vlm.run(work)


@contextmanager
def other_rounding(vlm: Vlm, precision: str) -> Iterator[None]:
    """Move every layer's output at random by as much as two kernels of a number format differ.

    Which way is drawn by a generator of its own. In FP8 only the layers that vLLM rounds move by so much.
    """
    generators: dict[torch.device, torch.Generator] = {}
    head, own = vlm.model.get_output_embeddings(), ROUNDING.get(precision, ROUNDING["bfloat16"])

    def moved(size: float) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            if output.device not in generators:
                generators[output.device] = torch.Generator(output.device).manual_seed(0)
            draw = torch.randn(output.shape, generator=generators[output.device], device=output.device)
            rounding = ROUNDING.get(str(output.dtype).removeprefix("torch."), 0.0)
            return (output.float() * (1 + max(size, rounding) * draw)).to(output.dtype)

        return hook

    with ExitStack() as hooks:
        for name, module in vlm.model.named_modules():
            has_matrix = any(p.ndim > 1 for p in module.parameters(recurse=False))
            rounded = has_matrix and "language_model" in name and not isinstance(module, nn.Embedding)
            size = ROUNDING["bfloat16"] if precision == "fp8" and (module is head or not rounded) else own
            hooks.callback(module.register_forward_hook(moved(size)).remove)
        yield


# --- images of the same size with other pixels ------------------------------------------------------------

Change = Callable[["Picture"], "Picture"]


def swapped(image: "Picture") -> "Picture":
    """Another image of the same size: upside down, every colour inverted."""
    return ImageOps.invert(image.rotate(180))


def with_images(prompt: Prompt, chat: Chat, change: Change) -> Prompt:
    """The prompt with each image changed, in the size in which the model sees it; its ids are the same."""
    images = []
    for ref in prompt.images:
        image = change(chat.resized(ref).convert("RGB"))
        limit = image.width * image.height
        images.append(image_from_bytes(encode(image, compress_level=1), limit=limit, where=prompt.problem_id))
    return replace(prompt, images=tuple(images))


def _blank(level: float) -> Change:
    return lambda image: Image.new("RGB", image.size, (round(255 * level),) * 3)


def _channels_reversed(image: "Picture") -> "Picture":
    return Image.merge("RGB", image.split()[::-1])


def _not_normalised(processor: Any) -> Change:
    """The pixels that, once normalised, are the values of these from 0 to 1 without normalisation."""
    means = getattr(processor, "image_mean", None) or [0.5] * 3
    scales = getattr(processor, "image_std", None) or [0.5] * 3
    table = [
        min(255, max(0, round(255 * (mean + scale * x / 255))))
        for mean, scale in zip(means, scales, strict=True)
        for x in range(256)
    ]
    return lambda image: image.point(table)


# --- positions --------------------------------------------------------------------------------------------


def _as_text(one: Pack) -> Pack:
    """Every token, of an image too, counts one."""
    return replace(one, positions=one.layout.depths().expand_as(one.positions))


def _one_axis(one: Pack) -> Pack:
    """All axes are the first: the tokens of an image share one position."""
    return replace(one, positions=one.positions[:1].expand_as(one.positions))


def _answer_by_count(one: Pack) -> Pack:
    """The answer goes on by the number of the prompt's tokens, not after its largest position."""
    positions, depths = one.positions.clone(), one.layout.depths()
    for segment in one.layout.segments:
        if segment.parent is not None:
            positions[..., segment.start : segment.stop] = depths[segment.start : segment.stop]
    return replace(one, positions=positions)


def _no_images(one: Pack) -> Pack:
    return replace(one, images=(), grids=None)


def _turned(prompt: Prompt) -> Prompt:
    return replace(prompt, grids=tuple((t, w, h) for t, h, w in prompt.grids))


# --- hypotheses -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault of a layer, in words that follow "as if"."""

    layer: Layer
    text: str


OLDER = Fault(layer="weights", text="it still had the weights of before the last update")


def hypotheses(
    scorer: Scorer, trees: Sequence[Tree], candidates: Tensor, others: Mapping[int, Prompt]
) -> Iterator[tuple[Fault, Callable[[], Computed]]]:
    """Faults, each with what the trainer computes if it has it; `others` are prompts with another image."""
    chat = scorer.chat

    def of_prompts(change: Callable[[int, Prompt], Prompt]) -> Callable[[], Computed]:
        changed = (replace(tree, prompt=change(i, tree.prompt)) for i, tree in enumerate(trees))
        return lambda: scorer(list(changed), candidates)

    def of_images(change: Change) -> Callable[[], Computed]:
        return of_prompts(lambda _, prompt: with_images(prompt, chat, change))

    def of_packs(change: Callable[[Pack], Pack]) -> Callable[[], Computed]:
        return lambda: scorer(trees, candidates, changed=change)

    if any(tree.prompt.images for tree in trees):
        if any(_turned(tree.prompt).grids != tree.prompt.grids for tree in trees):
            turned = of_prompts(lambda _, prompt: _turned(prompt))
            yield Fault(layer="grid", text="the rows and columns of an image changed places"), turned
        yield Fault(layer="pixels", text="there were no image"), of_packs(_no_images)
        yield Fault(layer="pixels", text="every image were black"), of_images(_blank(0.0))
        yield Fault(layer="pixels", text="every image were grey"), of_images(_blank(0.5))
        plain = of_images(_not_normalised(scorer.vlm.processor.image_processor))
        yield Fault(layer="pixels", text="pixels were not normalised"), plain
        yield Fault(layer="pixels", text="red and blue changed places"), of_images(_channels_reversed)
        other = of_prompts(lambda index, prompt: others.get(index, prompt))
        yield Fault(layer="pixels", text="it were the image of another request"), other
        several = [t.prompt for t in trees if len(t.prompt.images) > 1 and len(set(t.prompt.grids)) == 1]
        if several:
            order = of_prompts(
                lambda _, prompt: replace(prompt, images=prompt.images[::-1]) if prompt in several else prompt
            )
            yield Fault(layer="pixels", text="images came in the opposite order"), order
        if scorer.vlm.family.positions == "grid":
            text = "the tokens of an image counted like text"
            yield Fault(layer="positions", text=text), of_packs(_as_text)
            text = "the tokens of an image had no rows and columns"
            yield Fault(layer="positions", text=text), of_packs(_one_axis)
            text = "the answer's positions went on by the number of tokens"
            yield Fault(layer="positions", text=text), of_packs(_answer_by_count)
    if scorer.vlm.adapter is not None:
        bare = partial(scorer, trees, candidates, reference_mode=True)
        yield Fault(layer="weights", text="there were no adapters"), bare
