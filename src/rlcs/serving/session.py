"""Asks a model from Python: `rlcs.load(model).ask(image, question)`.

The prompt is built by segments (what people type stays text), images get the pixel bounds of the
training, and the system prompt is the one that was saved with the model.
"""

import math
import queue
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlcs.data.decoder import ImageDecoder
from rlcs.data.images import Measure, encode, image_from_bytes, image_from_path, measured, open_image
from rlcs.engines.branches import Token
from rlcs.engines.local import LocalEngine
from rlcs.errors import ImageError, OutOfMemory, PromptError, RlcsError, UserError
from rlcs.grading.extraction import extract
from rlcs.model import loading
from rlcs.model.chat import Chat, default_system
from rlcs.model.vlm import Vlm
from rlcs.recipe.schema import Images, Model, Prompts
from rlcs.records import ImageRef, Message, Prompt, Sampling, StopReason

CACHE_TOKENS = 1 << 18
"""Most prompt and answer tokens of which a session keeps keys and values, over all requests."""
PREFIX_BYTES = 1 << 30
"""Memory in which a session keeps the keys and values of prompts, for the next turn or question."""
GREEDY_BELOW = 1e-5
"""A temperature below is taken as 0: it draws the same tokens, and logits divided by it may be infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer of the model: `text` is all of it, `answer` the box's content, `reasoning` the text before.

    `stop` is `stop` (the model, or a stop string, ended it) or `length` (cut at the limit).
    """

    text: str
    answer: str | None
    reasoning: str
    tokens: int
    prompt_tokens: int
    stop: Literal["stop", "length"]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sampling settings. Temperature 0 is greedy; without a seed every sample differs."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        valid = 0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.max_new_tokens >= 1
        if not valid:
            fix = "temperature is 0 or more, top_p above 0 and at most 1, max_new_tokens 1 or more"
            raise UserError("these sampling settings cannot be used", where=str(self), fix=fix)


def split_answer(text: str) -> tuple[str, str | None]:
    r"""Split a response into its reasoning and the content of its box (None without one).

    Reasoning ends at `</think>`, or else where the box begins.
    """
    box = extract(text)
    reasoning, closed, _ = text.rpartition("</think>")
    if not closed:
        reasoning = text[: box.begins]
    return reasoning.replace("<think>", "").strip(), box.text


def picture(image: Any, *, limit: int, measure: Measure = measured) -> ImageRef:
    """Check an image given as path, bytes, PIL image or reference, and refer to it. Raises ImageError."""
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, str | Path):
        path = Path(image).absolute()
        return image_from_path(path.name, root=path.parent, limit=limit, measure=measure)
    if isinstance(image, bytes):
        return image_from_bytes(image, limit=limit, where="the image", measure=measure)
    if hasattr(image, "save"):
        return image_from_bytes(encode(image), limit=limit, where="the image")
    raise ImageError(f"a {type(image).__name__} is no image", fix="give a path, bytes or a PIL image")


def as_message(message: Message | Mapping[str, Any], *, limit: int, measure: Measure = measured) -> Message:
    """Convert a turn in any form that `Session.stream` takes. Raises PromptError, ImageError."""
    if isinstance(message, Message):
        return message
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or not content:
        fix = "write {'role': 'user', 'content': 'text'} or a list of texts and images as content"
        raise PromptError("this is no message", where=str(dict(message))[:80], fix=fix)
    parts = [content] if isinstance(content, str) else content
    read = (p if isinstance(p, str) else picture(p, limit=limit, measure=measure) for p in parts)
    return Message(role=role, parts=tuple(read))


class Stream(Iterator[str]):
    """Pieces of one answer as they arrive; `answer` holds the whole afterwards. `close` cancels it."""

    def __init__(self, engine: LocalEngine, prompt: Prompt, sampling: Sampling) -> None:
        """Submit the request at once."""
        self._started = time.perf_counter()
        self._events: queue.SimpleQueue[Token | Exception] = queue.SimpleQueue()
        self._text = ""
        self._request = engine.submit(prompt, sampling, listener=self._events.put)
        self._answer: Answer | None = None

    def __next__(self) -> str:
        """The next piece that is not empty. Raises RlcsError when the engine failed."""
        while self._answer is None and not self._request.cancelled:
            event = self._events.get()
            if isinstance(event, Exception):
                self.close()
                if isinstance(event, OutOfMemory):
                    raise event
                raise RlcsError(f"the model failed: {type(event).__name__}: {event}") from event
            self._text += event.text
            if event.stop is not None:
                self._answer = self._finished(event.stop)
            if event.text:
                return event.text
        raise StopIteration

    def _finished(self, stop: StopReason) -> Answer:
        reasoning, answer = split_answer(self._text)
        return Answer(
            text=self._text,
            answer=answer,
            reasoning=reasoning,
            tokens=len(self._request.rows[0].ids),
            prompt_tokens=len(self._request.prompt.ids),
            stop="length" if stop is StopReason.LENGTH else "stop",
            seconds=time.perf_counter() - self._started,
        )

    @property
    def answer(self) -> Answer:
        """The whole answer; waits until it is complete."""
        for _ in self:
            pass
        if self._answer is None:
            raise ValueError("the stream was closed before its end")
        return self._answer

    def close(self) -> None:
        """Stop generating."""
        self._request.cancel()

    def __del__(self) -> None:
        """Stop generating when the stream is garbage-collected."""
        self.close()


class Session:
    """A loaded model that answers, also to several threads at once."""

    def __init__(
        self, vlm: Vlm, *, name: str, max_rows: int = 64, decoder: ImageDecoder | None = None
    ) -> None:
        """At most `max_rows` answers are generated at once; others wait.

        With a `decoder` it decodes all images: those of strangers.
        """
        self.name = name
        self.context = int(vlm.model.config.get_text_config().max_position_embeddings)
        least, most = vlm.family.pixel_bounds(vlm.processor)
        system = default_system(vlm.processor, vlm.family.chat_format)
        prompts = Prompts(system=system, max_tokens=max(1, self.context - 1))
        images = Images(min_pixels=least, max_pixels=most)
        decode = decoder.open_image if decoder else open_image
        self.measure: Measure = decoder.measured if decoder else measured
        self.chat: Chat = loading.make_chat(vlm, prompts, images, decode=decode)
        self.engine = LocalEngine(
            vlm, self.chat, max_rows=max_rows, cache_tokens=CACHE_TOKENS, prefix_bytes=PREFIX_BYTES
        )
        self._decode_limit = images.decode_limit

    def ask(
        self,
        image: Any,
        question: str,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 1024,
        seed: int | None = None,
    ) -> Answer:
        """Answer a question about an image (or a list of them, or None); waits for the whole answer.

        An image is a path, encoded bytes, a PIL image or an ImageRef. Raises ImageError, PromptError.
        """
        settings = Settings(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        return self.stream([self.message(image, question)], settings).answer

    def message(self, image: Any, text: str) -> Message:
        """Make a user's turn: images first, then text."""
        images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        refs = [picture(item, limit=self._decode_limit, measure=self.measure) for item in images]
        return Message(role="user", parts=(*refs, text))

    def stream(
        self, messages: Sequence[Message | Mapping[str, Any]], settings: Settings | None = None
    ) -> Stream:
        """Answer a conversation of several turns, piece by piece.

        A message is a `Message`, or a mapping with `role` and `content`: a text, or a list of texts and
        images (paths as `Path`) in their order. A first message of role `system` replaces the model's own
        system prompt.
        """
        turns = [as_message(each, limit=self._decode_limit, measure=self.measure) for each in messages]
        prompt = self.chat.checked(self.chat.conversation(turns, name="conversation"))
        return self.start(prompt, settings or Settings())

    def start(self, prompt: Prompt, settings: Settings) -> Stream:
        """Answer a prompt, piece by piece."""
        return Stream(self.engine, prompt, self.sampling(prompt, settings))

    def sampling(self, prompt: Prompt, settings: Settings, *, n: int = 1) -> Sampling:
        """Convert settings for the engine; an answer ends at the latest where the context ends."""
        return self.chat.sampling(
            n=n,
            temperature=0.0 if settings.temperature < GREEDY_BELOW else settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=min(settings.max_new_tokens, self.context - len(prompt.ids)),
            seed=secrets.randbits(32) if settings.seed is None else settings.seed,
        )


def load(
    model: str = "builtin",
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    decoder: ImageDecoder | None = None,
) -> Session:
    """Load a model to ask: a folder, a hub id or `builtin`; `decoder` as in `Session`. Raises ModelError."""
    return Session(loading.load(Model(name=model, dtype=dtype)), name=model, decoder=decoder)
