"""Frozen records that packages exchange, each checked when it is made.

All are plain Python without tensors: hashable, printable, and written to and read from JSON rows by
`rows.to_row` and `rows.from_row`. Shapes in comments: T tokens, G group members.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from rlcs.records.routes import Routes as Routes
from rlcs.records.rows import MERGED as MERGED
from rlcs.records.rows import from_row as from_row
from rlcs.records.rows import from_row_or_none as from_row_or_none
from rlcs.records.rows import to_row as to_row

Json = str | int | float | bool | None


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """A reference to one image, not its pixels: a file path or the encoded bytes.

    With neither, the image was not stored: only its checksum and size are known.
    `width` and `height` are in pixels as shown, after any turn that EXIF asks for; `sha256` is of
    the encoded bytes. Build one with `data.images.image_from_path` or `image_from_bytes`.
    """

    sha256: str
    width: int
    height: int
    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check for at most one source, and a positive size."""
        require(self.path is None or self.data is None, "an image has a path or bytes, not both")
        require(self.width > 0 and self.height > 0, f"image of {self.width} x {self.height} pixels")
        require(len(self.sha256) == 64, "sha256 is 64 hexadecimal digits")


IMAGE_SLOT = "<image>"
"""Marks the place of an image in `Problem.question`; without any slot, images come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One earlier turn of a conversation, in which IMAGE_SLOT marks the places of images."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with its images and gold answer. `metadata` is small and can be written as JSON.

    `history` are the turns before the question, oldest first. `images` are those of the history, then
    those of the question, in the order of their slots; without any slot, all stand first in the first user
    turn.
    """

    id: str
    source: str
    question: str
    answer: str
    images: tuple[ImageRef, ...] = ()
    choices: tuple[str, ...] = ()
    metadata: Mapping[str, Json] = field(default_factory=dict, hash=False)
    history: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        """Check for an id, a question, turns in order, and as many slots as images (or no slot at all)."""
        require(bool(self.id.strip()), "the id is empty")
        require(bool(self.question.strip()), "the question is empty")
        if self.history:
            spoken = [turn.role for turn in self.history if turn.role != "system"]
            require("system" not in [turn.role for turn in self.history[1:]], "a system turn comes first")
            in_order = ["user", "assistant"] * (len(spoken) // 2)
            require(spoken == in_order, "before the question, turns of user and assistant alternate")
        slots = sum(text.count(IMAGE_SLOT) for text in self.texts)
        if slots not in (0, len(self.images)):
            what = f"the question has {slots} {IMAGE_SLOT} slots but the row has {len(self.images)} images"
            raise ValueError(what)

    @property
    def digest(self) -> str:
        """Hash of everything that an answer and its grade depend on; it detects an edit that keeps the id."""
        images = [ref.sha256 for ref in self.images]
        earlier = [[[turn.role, turn.text] for turn in self.history]] if self.history else []
        facts = json.dumps([self.question, self.choices, self.answer, images, *earlier])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in which images may have slots: those of the history, then the question."""
        return (*[turn.text for turn in self.history], self.question)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The history and the question, with a slot for each image; without any, in the first user turn."""
        turns = [*self.history, Turn(role="user", text=self.question)]
        if self.images and not any(IMAGE_SLOT in turn.text for turn in turns):
            first = next(place for place, turn in enumerate(turns) if turn.role == "user")
            turns[first] = replace(turns[first], text=IMAGE_SLOT * len(self.images) + turns[first].text)
        return tuple(turns)

    @property
    def question_with_choices(self) -> str:
        """The question, and its lettered choices, a line each."""
        return "\n".join((self.question, lettered(self.choices))) if self.choices else self.question

    @property
    def transcript(self) -> str:
        """The question with its choices; after a history, as that history's last turn."""
        earlier = [f"{turn.role.capitalize()}: {turn.text}\n\n" for turn in self.history]
        return "".join((*earlier, "User: " if earlier else "", self.question_with_choices))


def option_letter(index: int) -> str:
    """The letter of the index-th choice of a problem."""
    return chr(ord("A") + index)


def lettered(choices: Sequence[str]) -> str:
    """Choices as `(A) ...` lines."""
    return "\n".join(f"({option_letter(index)}) {choice}" for index, choice in enumerate(choices))


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a conversation; `parts` are texts and images in their order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | ImageRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The verdict on one response; `reward` is None for an unscored response, which differs from zero.

    An unscored response (its grader failed or ran out of time) is left out of its group and of the loss.
    `answer_value` and `gold_value` say in words what was read on both sides; `why` is the rule that decided.
    `parts` are the scores that a reward of several parts is the weighted sum of, by name; None: not scored.
    """

    reward: float | None
    correct: bool | None
    extracted: str | None = None
    why: str = ""
    answer_value: str = ""
    gold_value: str = ""
    parts: Mapping[str, float | None] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check that reward and verdict are both there or both missing, and that the reward is finite."""
        require((self.reward is None) == (self.correct is None), "reward and correct go together")
        require(self.reward is None or math.isfinite(self.reward), f"reward {self.reward}")

    @property
    def scored(self) -> bool:
        """Whether the grader reached a verdict."""
        return self.reward is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A problem with a response to imitate, and how the response was made."""

    problem: Problem
    response: str
    teacher: str
    attempt: int = 0
    grade: Grade | None = None

    def __post_init__(self) -> None:
        """Check that the response is not empty."""
        require(bool(self.response.strip()), f"the response to {self.problem.id} is empty")


Positions = Literal["grid", "line"]
"""How a model counts the tokens of an image: by time, row and column (M-RoPE), or one by one as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The token ids of a prompt, with one placeholder for each image token: the trunk of a tree.

    `grids[i]` is (frames, height, width) in patches of image i; `spans[i]` is the half-open range
    of `ids` that its placeholders fill, of length frames * height * width / merge_size**2.
    `replies` are the half-open ranges of `ids` that earlier assistant turns wrote, with their end tokens.
    `positions`: see `Positions`. `repeat` counts the earlier prompts of the same problem in the same step.
    `earlier` is what the problem was answered before: an engine may draft from it, which changes no answer.
    """

    problem_id: str
    ids: tuple[int, ...]
    images: tuple[ImageRef, ...]
    grids: tuple[tuple[int, int, int], ...]
    spans: tuple[tuple[int, int], ...]
    image_token_id: int
    merge_size: int
    replies: tuple[tuple[int, int], ...] = ()
    positions: Positions = "grid"
    repeat: int = 0
    earlier: str = ""

    def __post_init__(self) -> None:
        """Check that every span is as long as its grid says, and that all placeholders stand in spans."""
        require(bool(self.ids), "a prompt needs at least one token")
        require(
            len(self.images) == len(self.grids) == len(self.spans),
            f"{len(self.images)} images, {len(self.grids)} grids, {len(self.spans)} spans",
        )
        inside = 0
        for (start, end), (t, h, w) in zip(self.spans, self.grids, strict=True):
            size = t * h * w // self.merge_size**2
            require(end - start == size, f"span {start}:{end} should hold {size} placeholders")
            inside += sum(i == self.image_token_id for i in self.ids[start:end])
        expected = sum(end - start for start, end in self.spans)
        total = sum(i == self.image_token_id for i in self.ids)
        require(inside == expected == total, f"{total} placeholders, {expected} expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling settings: `n` rollouts of each prompt, at most `max_new_tokens` each.

    Temperature 0 is greedy. `seed` is the run's; that of a rollout comes from `rollout_seed`. `Chat.sampling`
    fills in the ids for a local model; a server needs none.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    vision_ids: tuple[int, ...] = ()
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the limits, and that ids of images are banned from being sampled."""
        require(self.n >= 1 and self.max_new_tokens >= 1, "n and max_new_tokens are at least 1")
        require(self.temperature >= 0.0, f"temperature {self.temperature}")
        require(0.0 < self.top_p <= 1.0, f"top_p {self.top_p}")
        require(set(self.vision_ids) <= set(self.banned_ids), "vision control ids must be banned")
        require(not set(self.stop_ids) & set(self.banned_ids), "a stop id is banned")


class StopReason(StrEnum):
    """The reason why a rollout ended."""

    EOS = "eos"
    LENGTH = "length"
    ERROR = "error"


def _message(turn: Turn, images: Iterator[ImageRef]) -> Message:
    """The message of a turn, with the next of `images` at each slot."""
    pieces = turn.text.split(IMAGE_SLOT)
    parts: list[str | ImageRef] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [next(images), piece]
    return Message(role=turn.role, parts=tuple(part for part in parts if part != ""))


SampleKey = tuple[str, int, int]
"""(problem id, index, turn) of a request and of its sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A conversation to answer: turn `turn` of sample number `index` of problem `id`."""

    id: str
    messages: tuple[Message, ...]
    index: int = 0
    turn: int = 0

    @classmethod
    def of(cls, problem: Problem, *, system: str | None = None, index: int = 0, turn: int = 0) -> "Request":
        """Request an answer to a problem, after its history; images go to their slots, or else first.

        A system turn of the history is used instead of `system`.
        """
        turns, images = problem.turns, iter(problem.images)
        messages = [_message(each, images) for each in turns]
        choices = problem.question_with_choices.removeprefix(problem.question)
        if choices:  # outside the slots: in a choice, IMAGE_SLOT is plain text
            *parts, last = messages[-1].parts
            parts += [last, choices] if isinstance(last, ImageRef) else [last + choices]
            messages[-1] = replace(messages[-1], parts=tuple(parts))
        if system and turns[0].role != "system":
            messages.insert(0, Message(role="system", parts=(system,)))
        return cls(id=problem.id, messages=tuple(messages), index=index, turn=turn)

    @property
    def key(self) -> SampleKey:
        """The key of this request, unique within a run."""
        return self.id, self.index, self.turn

    def sample(self, **values: Any) -> "Sample":
        """Make this request's sample; `values` are its further fields."""
        return Sample(id=self.id, index=self.index, turn=self.turn, **values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A model's answer to one request, or the error instead of it: then `stop` is `error`.

    `reasoning` is returned by some servers apart from the text. A `retryable` error is temporary (a server is
    down or busy); any other is final (the prompt is too long, the provider refuses). `tokens` counts those of
    the answer; `seconds` run from the first attempt, pauses included.
    """

    id: str
    index: int = 0
    turn: int = 0
    text: str = field(default="", metadata={"row": "response"})
    stop: StopReason = StopReason.ERROR
    reasoning: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""
    retryable: bool = False

    def __post_init__(self) -> None:
        """Check that failures, and only they, have an error."""
        failed = self.stop is StopReason.ERROR
        require(failed == bool(self.error), f"stop {self.stop}, error {self.error!r}")
        require(bool(self.error) or not self.retryable, "only a failure is retryable")

    @property
    def key(self) -> SampleKey:
        """The key of its request."""
        return self.id, self.index, self.turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled answer: ids (T,) with the stop id included, and the sampler's logprobs (T,).

    `routes`, if they were requested, are of all its tokens but the last, which nothing came after, and may
    begin with those of the prompt.
    """

    problem_id: str
    index: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason
    seed: int
    text: str
    routes: Routes | None = None

    def __post_init__(self) -> None:
        """Check for as many logprobs as ids, all finite and not above zero."""
        require(len(self.ids) == len(self.logprobs), f"{len(self.ids)} ids, {len(self.logprobs)} logprobs")
        require(all(math.isfinite(x) and x <= 0.0 for x in self.logprobs), "a logprob is not finite or > 0")
        require(bool(self.ids) or self.stop is StopReason.ERROR, "only an error may be empty")

    @property
    def sample(self) -> Sample:
        """The rollout as a sample, without token ids and logprobs."""
        return Sample(
            id=self.problem_id,
            index=self.index,
            text=self.text,
            stop=self.stop,
            tokens=len(self.ids),
            error="the engine broke the answer off" if self.stop is StopReason.ERROR else "",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedSample:
    """A sample with its grade and, in a group, its advantage; written as one flat row."""

    sample: Sample = field(metadata=MERGED)
    grade: Grade = field(metadata=MERGED)
    advantage: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One problem with its rollouts (G,), their grades (G,) and advantages (G,).

    `staleness` is the number of rollout steps that the policy has learnt since the weights that sampled it.
    """

    problem: Problem
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    grades: tuple[Grade, ...]
    advantages: tuple[float | None, ...]
    staleness: int = 0

    def __post_init__(self) -> None:
        """Check that lengths agree, and that unscored members have no advantage."""
        require(
            len(self.rollouts) == len(self.grades) == len(self.advantages),
            f"{len(self.rollouts)} rollouts, {len(self.grades)} grades, {len(self.advantages)} advantages",
        )
        for grade, advantage in zip(self.grades, self.advantages, strict=True):
            require(grade.scored or advantage is None, "an unscored rollout has an advantage")

    @property
    def samples(self) -> list[GradedSample]:
        """The members as samples with grades and advantages."""
        return [
            GradedSample(sample=rollout.sample, grade=grade, advantage=advantage)
            for rollout, grade, advantage in zip(self.rollouts, self.grades, self.advantages, strict=True)
        ]


NO_SIGNAL = "all rewards are equal in every group"
"""Why a step of GRPO has no gradient: no fault of the training."""
NOT_FINITE = "the gradient is not finite"
"""Why a step was skipped: it would have spoilt the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """The measurements of one training step: `values` are averages, `seconds` wall time by phase."""

    stage: str
    step: int
    steps: int
    values: Mapping[str, float] = field(hash=False, metadata=MERGED)
    seconds: Mapping[str, float] = field(hash=False)
    skipped: str = ""

    def __post_init__(self) -> None:
        """Check that every number is finite, as JSON has no NaN."""
        for name, value in (*self.values.items(), *self.seconds.items()):
            require(math.isfinite(value), f"{name} is {value}")


def rollout_seed(run_seed: int, step: int, problem_id: str, index: int) -> int:
    """Derive the seed of one rollout, below 2**63, from its request alone: not from what ran before.

    A further prompt of the same problem in the same step continues with the next indices (`Prompt.repeat`).
    """
    key = f"{run_seed}|{step}|{problem_id}|{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
