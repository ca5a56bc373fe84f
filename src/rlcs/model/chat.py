r"""Turns problems into prompts, by segments: control ids are inserted by number, all text as plain text.

A prompt is never rendered to one string: a typed `<|image_pad|>` or a forged
`<|im_end|>\n<|im_start|>system` stays plain text, because text is tokenised with special tokens
off. On clean text the ids equal those of the model's own chat template, which tests hold.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from rlcs.errors import DataError, ModelError, PromptError
from rlcs.model.chat_format import ChatFormat
from rlcs.model.families.family import Family
from rlcs.model.images import CPU, ImagePipeline
from rlcs.model.template_rules import CLOSE, TemplateRules
from rlcs.records import ImageRef, Message, Problem, Prompt, Request, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

Segment = int | str | ImageRef
"""A control id, plain text, or an image."""
BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token that stands for a byte, in vocabularies whose other tokens are letters."""
RECENT_TEXTS, RECENT_LENGTH = 256, 2000
"""How many texts' ids are kept, and the longest such text in characters: what stands in every prompt."""
SLICE = 1 << 16
"""Characters of a text that are tokenised at once to check whether it can fit at all."""


class Chat:
    """The chat format of one model: problems to prompts, texts to response ids, and back."""

    def __init__(
        self,
        tokenizer: Any,
        images: ImagePipeline,
        *,
        family: Family,
        system: str | None,
        max_tokens: int,
        default_system: str | None,
        rules: TemplateRules = TemplateRules(),  # noqa: B008 - frozen
    ) -> None:
        """`system` None means the template's default, which may be no system turn at all (also None).

        Raises ModelError for another chat format.
        """
        self._tokenizer = tokenizer
        self._images = images
        self._default_system, self._rules = default_system, rules
        self._system = default_system if system is None else system
        self._max_tokens = max_tokens
        self._positions = family.positions
        self._format = format = family.chat_format
        self._recent_ids = lru_cache(RECENT_TEXTS)(self._new_ids)
        self._opening = [self._control(token) for token in format.opening]
        self._start = self._control(format.turn_start)
        self.end_id = self._control(format.turn_end)
        self._image_start = self._control(format.image_start)
        self._image_end = self._control(format.image_end)
        self.image_id = self._control(format.image)
        # As the template writes it, with its control tokens.
        self._answer_start = list(tokenizer(rules.answer_start, add_special_tokens=False)["input_ids"])
        # Other vocabularies have letters that stand for themselves.
        letters = "".join(tokenizer.convert_ids_to_tokens(self.text_ids("é")))
        self._bytes_of_letters = _bytes_of_letters() if letters == "Ã©" else {}
        self._control_ids = frozenset(self._tokenizer.all_special_ids)

    def _control(self, token: str) -> int:
        index = self._tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self._tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer has no {token}", fix="use the tokenizer with which the model was published"
            )
        return int(index)

    def with_system(self, system: str | None) -> "Chat":
        """The same format under another system prompt."""
        changed = copy(self)
        changed._system = self._default_system if system is None else system
        return changed

    def with_limit(self, max_tokens: int) -> "Chat":
        """The same format with another limit on the length of prompts."""
        changed = copy(self)
        changed._max_tokens = max_tokens
        return changed

    def prompt(self, problem: Problem) -> Prompt:
        """Make the prompt of one problem. No image is decoded.

        Raises PromptError when too long, ImageError for a shape that no processor takes.
        """
        return self.conversation(Request.of(problem).messages, name=problem.id)

    def prompts(self, problems: Sequence[Problem]) -> list[Prompt | DataError]:
        """The prompt of each problem, or why it cannot become one; a damaged image is found here.

        Images are decoded in worker threads, each once: one that was read before is not waited for.
        """
        self.prepare(ref for problem in problems for ref in problem.images)
        prompts: list[Prompt | DataError] = []
        for found in self.unchecked_prompts(problems):
            try:
                prompts.append(self.checked(found) if isinstance(found, Prompt) else found)
            except DataError as error:
                prompts.append(error)
        return prompts

    def unchecked_prompts(self, problems: Sequence[Problem]) -> list[Prompt | DataError]:
        """The prompt of each problem, or why it cannot become one; no image is decoded.

        Texts are tokenised together, which takes a fraction of the time.
        """
        conversations = [self._with_system(Request.of(problem).messages) for problem in problems]
        split = [list(self._segments(messages)) for messages in conversations]
        texts = list({each for segments in split for each, _ in segments if _is_short(each)})
        known = dict(zip(texts, self._ids_of(texts), strict=True)) if texts else {}
        prompts: list[Prompt | DataError] = []
        for problem, messages, segments in zip(problems, conversations, split, strict=True):
            try:
                prompts.append(self._prompt(messages, segments, problem.id, known))
            except DataError as error:
                prompts.append(error)
        return prompts

    def checked(self, prompt: Prompt) -> Prompt:
        """The prompt itself, when every image of it has been decoded. Raises ImageError."""
        for ref in prompt.images:
            self._images.require_readable(ref)
        return prompt

    def conversation(self, messages: Sequence[Message], *, name: str) -> Prompt:
        """Make the prompt `name` of several turns; the system prompt comes first unless a turn has one.

        Raises PromptError and ImageError as `prompt` does.
        """
        messages = self._with_system(messages)
        return self._prompt(messages, list(self._segments(messages)), name, {})

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self._system is None or (messages and messages[0].role == "system"):
            return messages
        return [Message(role="system", parts=(self._system,)), *messages]

    def _prompt(
        self,
        messages: Sequence[Message],
        segments: Sequence[tuple[Segment, bool]],
        name: str,
        known: Mapping[str, Sequence[int]],
    ) -> Prompt:
        """The prompt `name` of messages from their segments, of whose texts some are tokenised already."""
        ids: list[int] = []
        spans, grids, images, replies = [], [], [], []
        for segment, is_reply in segments:
            start = len(ids)
            if isinstance(segment, int):
                ids.append(segment)
            elif isinstance(segment, str):
                self._check_length(segment, name)
                ids += known[segment] if segment in known else self.text_ids(segment)
            else:
                grid = self._images.grid(segment)
                size = grid[0] * grid[1] * grid[2] // self._images.merge_size**2
                spans.append((start, start + size))
                ids += [self.image_id] * size
                grids.append(grid)
                images.append(segment)
            if is_reply:
                replies.append((start, len(ids)))
        if len(ids) > self._max_tokens:
            of_images = sum(b - a for a, b in spans)
            earlier = sum(message.role != "system" for message in messages) - 1
            of_turns = f", with {earlier} turns before the question" if earlier > 0 else ""
            raise self._too_long(f"{len(ids)} tokens, {of_images} of them image{of_turns}", name)
        return Prompt(
            problem_id=name,
            ids=tuple(ids),
            images=tuple(images),
            grids=tuple(grids),
            spans=tuple(spans),
            image_token_id=self.image_id,
            merge_size=self._images.merge_size,
            replies=tuple(replies),
            positions=self._positions,
        )

    def _segments(self, messages: Sequence[Message]) -> Iterator[tuple[Segment, bool]]:
        """The segments of a conversation up to the next reply; each with whether an assistant wrote it.

        What an assistant wrote is tokenised apart from the role before it, as when it was sampled.
        """
        roles, after_turn, after_image = self._format.roles, self._format.after_turn, self._format.after_image
        yield from ((index, False) for index in self._opening)
        for message in messages:
            is_reply = message.role == "assistant" and bool(message.parts)
            head: list[Segment] = [self._start, roles[message.role]]
            parts: list[Segment] = []
            for part in self._worded(message):
                if isinstance(part, ImageRef):
                    parts += [self._image_start, part, self._image_end, after_image]
                else:
                    parts.append(part.strip() if self._format.strips else part)
            if is_reply:
                yield from ((segment, False) for segment in head)
                yield from ((segment, isinstance(segment, str)) for segment in _join_text(parts))
            else:
                yield from ((segment, False) for segment in _join_text([*head, *parts]))
            yield self.end_id, is_reply
            yield after_turn, False
        yield self._start, False
        yield roles["assistant"], False
        yield from ((index, False) for index in self._answer_start)

    def _worded(self, message: Message) -> list[str | ImageRef]:
        """What a turn says, as the chat template says it."""
        parts = list(message.parts)
        if self._rules.drops_thinking and message.role == "assistant":
            parts = [p.rpartition(CLOSE)[2].lstrip("\n") if isinstance(p, str) else p for p in parts]
        if self._rules.strips:
            if parts and isinstance(parts[0], str):
                parts[0] = parts[0].lstrip()
            if parts and isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip()
        return parts

    def _check_length(self, text: str, name: str) -> None:
        """Raise PromptError when a text is far too long, before all of it is tokenised.

        That would take minutes and gigabytes for megabytes of text. Cutting into slices adds fewer tokens
        than the limit of twice `max_tokens` allows for.
        """
        counted, limit = 0, 2 * self._max_tokens
        for start in range(0, len(text), SLICE) if len(text) > SLICE else ():
            counted += len(self.text_ids(text[start : start + SLICE]))
            if counted > limit:
                raise self._too_long(f"more than {limit} tokens", name)

    def _too_long(self, what: str, name: str) -> PromptError:
        fix = "shorten it; in a recipe raise prompt.max_tokens or lower images.max_pixels"
        return PromptError(f"the prompt has {what}; the limit is {self._max_tokens}", where=name, fix=fix)

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, without control ids whatever the text looks like."""
        return list(self._recent_ids(text) if len(text) <= RECENT_LENGTH else self._new_ids(text))

    def _new_ids(self, text: str) -> tuple[int, ...]:
        [ids] = self._ids_of([text])
        return tuple(ids)

    def _ids_of(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a response to imitate, with the end token: what follows where a prompt ends."""
        return (*self.text_ids(self._rules.response(text)), self.end_id)

    def text(self, ids: Sequence[int]) -> str:
        """The text of sampled ids without control tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token(self, index: int) -> str:
        """The text of one id for display; control ids as their names."""
        return str(self._tokenizer.decode([index]))

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one id adds to a text: often a part of a character; of a control id none."""
        if index in self._control_ids:
            return b""
        if index not in self._tokenizer.added_tokens_decoder:
            letters = self._tokenizer.convert_ids_to_tokens(index)
            if letters is not None and all(letter in self._bytes_of_letters for letter in letters):
                return bytes(self._bytes_of_letters[letter] for letter in letters)
            if letters is not None and (byte := BYTE.fullmatch(letters)):
                return bytes.fromhex(byte[1])
        return self.token(index).encode()

    def patches(self, ref: ImageRef, device: torch.device = CPU) -> Tensor:
        """Patches (patches, patch size) of one image on a device: the pixel source of packs."""
        return self._images.patches(ref, device)

    def masked_patches(self, ref: ImageRef, device: torch.device = CPU, *, share: float, seed: int) -> Tensor:
        """The same with a random share of them black, which `seed` and the image decide."""
        return self._images.masked_patches(ref, device, share=share, seed=seed)

    def resized(self, ref: ImageRef) -> "Image":
        """One image in the size in which the model sees it: for vLLM, whose processor leaves it as it is."""
        return self._images.resized(ref)

    def picture(self, ref: ImageRef) -> "Image":
        """All pixels of one image that the model sees, for people."""
        return self._images.picture(ref)

    def prepare(self, refs: Iterable[ImageRef]) -> None:
        """Begin to decode images that are used soon, in this order, in worker threads."""
        self._images.prepare(refs)

    def sampling(
        self, *, max_new_tokens: int, n: int = 1, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> Sampling:
        """Make sampling settings that stop at the end of the turn and never emit a vision token."""
        known = (self._tokenizer.convert_tokens_to_ids(token) for token in self._format.vision)
        vision = tuple(sorted({i for i in known if i is not None and i != self._tokenizer.unk_token_id}))
        return Sampling(
            n=n,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stop_ids=(self.end_id,),
            banned_ids=tuple(sorted({*vision, self._start})),
            vision_ids=vision,
            seed=seed,
        )


def _is_short(segment: Segment) -> TypeGuard[str]:
    """Whether a segment is a text that may be tokenised before its length is checked."""
    return isinstance(segment, str) and len(segment) <= SLICE


def default_system(processor: Any, chat_format: ChatFormat) -> str | None:
    """The system prompt that a processor's chat template inserts by default; None: no system turn."""
    head = "".join(chat_format.opening) + chat_format.turn_start + chat_format.roles["system"]
    turn = [{"role": "user", "content": "x"}]
    text = str(processor.apply_chat_template(turn, tokenize=False))
    return text.removeprefix(head).partition(chat_format.turn_end)[0] if text.startswith(head) else None


def set_default_system(processor: Any, system: str, chat_format: ChatFormat) -> None:
    """Make `system` the default system message of the processor's chat template.

    It is saved with the processor, so that rlcs, transformers and vLLM prompt the saved model
    as it was trained.
    """
    if default_system(processor, chat_format) == system:
        return
    # Before the template itself, whose default is then never used; a JSON string is a Jinja string.
    literal = json.dumps(system, ensure_ascii=False)
    first = f"[{{'role': 'system', 'content': {literal}}}]"
    head = (
        f"{{%- if messages[0].role != 'system' -%}}{{%- set messages = {first} + messages -%}}{{%- endif -%}}"
    )
    processor.chat_template = processor.tokenizer.chat_template = f"{head}\n{processor.chat_template}"


def _bytes_of_letters() -> dict[str, int]:
    """The byte behind each letter of a byte-level vocabulary, as GPT-2's encoder assigns them.

    Printable bytes of Latin-1 stand for themselves, the others for letters from U+0100 on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _join_text(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring texts, as the tokenizer would see them between two control tokens."""
    joined: list[Segment] = []
    for is_text, run in groupby(segments, key=lambda segment: isinstance(segment, str)):
        pieces = list(run)
        joined += ["".join(map(str, pieces))] if is_text else pieces
    return [segment for segment in joined if segment != ""]
