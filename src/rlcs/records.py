"""Frozen records that the packages hand to each other, each checked when it is made.

Everything here is plain Python (no tensors): hashable, printable, and written to and read from JSON
rows by `to_row` and `from_row`. Tensors begin in `model.packing`. Suffixes in comments: T tokens,
G group members.
"""

import hashlib
import json
import math
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum, StrEnum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

Json = str | int | float | bool | None
MERGED = {"row": ""}
"""Metadata of a field whose entries stand directly in the record's JSON row: `field(metadata=MERGED)`.

`field(metadata={"row": "id"})` gives a field another name in the row.
"""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """A reference to one image, never its pixels: a file path or the encoded bytes.

    `width` and `height` are in pixels as shown, after any turn that EXIF asks for; `sha256` is of
    the encoded bytes. Build one with `data.images.image_from_path` or `image_from_bytes`.
    """

    sha256: str
    width: int
    height: int
    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Exactly one source, a real size."""
        _require((self.path is None) != (self.data is None), "an image has a path or bytes, not both")
        _require(self.width > 0 and self.height > 0, f"image of {self.width} x {self.height} pixels")
        _require(len(self.sha256) == 64, "sha256 is 64 hexadecimal digits")


IMAGE_SLOT = "<image>"
"""Where an image stands in `Problem.question`; without any slot, images come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with its images and gold answer. `metadata` is small and JSON-able."""

    id: str
    source: str
    question: str
    answer: str
    images: tuple[ImageRef, ...] = ()
    choices: tuple[str, ...] = ()
    metadata: Mapping[str, Json] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """An id, a question, and as many slots as images (or no slot at all)."""
        _require(bool(self.id.strip()), "the id is empty")
        _require(bool(self.question.strip()), "the question is empty")
        slots = self.question.count(IMAGE_SLOT)
        _require(
            slots in (0, len(self.images)),
            f"the question has {slots} {IMAGE_SLOT} slots but the row has {len(self.images)} images",
        )

    @property
    def digest(self) -> str:
        """A hash of what an answer and its grade depend on; an id may be the number of an edited row."""
        images = [ref.sha256 for ref in self.images]
        facts = json.dumps([self.question, self.choices, self.answer, images])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def asked(self) -> str:
        """The question, and its choices by letter, a line each."""
        lines = (f"({chr(65 + index)}) {choice}" for index, choice in enumerate(self.choices))
        return "\n".join((self.question, *lines))


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn; `parts` are texts and images in their order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | ImageRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """The verdict on one response; `reward is None` means unscored, which is not zero.

    An unscored response (its grader failed or ran out of time) leaves its group: it never
    teaches the model that it was wrong.
    """

    reward: float | None
    correct: bool | None
    extracted: str | None = None
    why: str = ""

    def __post_init__(self) -> None:
        """Unscored exactly when there is no verdict; rewards are finite."""
        _require((self.reward is None) == (self.correct is None), "reward and correct go together")
        _require(self.reward is None or math.isfinite(self.reward), f"reward {self.reward}")

    @property
    def scored(self) -> bool:
        """Whether the grader reached a verdict."""
        return self.reward is not None

    @classmethod
    def binary(cls, correct: bool | None, why: str, extracted: str | None = None) -> "Grade":
        """The grade with reward 1 or 0; unscored where `correct` is None."""
        reward = None if correct is None else float(correct)
        return cls(reward=reward, correct=correct, extracted=extracted, why=why)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A problem with a response to imitate, and how the response was made."""

    problem: Problem
    response: str
    teacher: str
    attempt: int = 0
    grade: Grade | None = None

    def __post_init__(self) -> None:
        """A response of white space teaches nothing."""
        _require(bool(self.response.strip()), f"the response to {self.problem.id} is empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Token ids with image placeholders expanded: the trunk of a tree.

    `grids[i]` is (frames, height, width) in patches of image i; `spans[i]` is the half-open range
    of `ids` that its placeholders fill, of length frames * height * width / merge_size**2.
    `repeat` counts how often its problem was asked before in the same step.
    """

    problem_id: str
    ids: tuple[int, ...]
    images: tuple[ImageRef, ...]
    grids: tuple[tuple[int, int, int], ...]
    spans: tuple[tuple[int, int], ...]
    image_token_id: int
    merge_size: int
    repeat: int = 0

    def __post_init__(self) -> None:
        """Every span is as long as its grid says, and no placeholder stands outside a span."""
        _require(bool(self.ids), "a prompt needs at least one token")
        _require(
            len(self.images) == len(self.grids) == len(self.spans),
            f"{len(self.images)} images, {len(self.grids)} grids, {len(self.spans)} spans",
        )
        inside = 0
        for (start, end), (t, h, w) in zip(self.spans, self.grids, strict=True):
            size = t * h * w // self.merge_size**2
            _require(end - start == size, f"span {start}:{end} should hold {size} placeholders")
            inside += sum(i == self.image_token_id for i in self.ids[start:end])
        expected = sum(end - start for start, end in self.spans)
        total = sum(i == self.image_token_id for i in self.ids)
        _require(inside == expected == total, f"{total} placeholders, {expected} expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to sample: `n` rollouts a prompt, at most `max_new_tokens` each.

    Temperature 0 is greedy. `seed` is the run's; a rollout's own seed comes from `rollout_seed`. The ids are
    filled in by the chat format of a model of ours (`Chat.sampling`); a server has its own.
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
        """Sane limits; ids that stand for images are never sampled."""
        _require(self.n >= 1 and self.max_new_tokens >= 1, "n and max_new_tokens are at least 1")
        _require(self.temperature >= 0.0, f"temperature {self.temperature}")
        _require(0.0 < self.top_p <= 1.0, f"top_p {self.top_p}")
        _require(set(self.vision_ids) <= set(self.banned_ids), "vision control ids must be banned")
        _require(not set(self.stop_ids) & set(self.banned_ids), "a stop id is banned")


class StopReason(StrEnum):
    """Why a rollout ended."""

    EOS = "eos"
    LENGTH = "length"
    ERROR = "error"


SampleKey = tuple[str, int, int]
"""(problem id, index, turn) of a request and of its sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A conversation to answer: sample number `index` of problem `id`, in turn `turn` of several."""

    id: str
    messages: tuple[Message, ...]
    index: int = 0
    turn: int = 0

    @classmethod
    def of(cls, problem: Problem, *, system: str | None = None, index: int = 0, turn: int = 0) -> "Request":
        """A problem with its choices; images stand at their slots, or first where there are none."""
        pieces = problem.question.split(IMAGE_SLOT)
        if len(pieces) == 1:
            pieces = [""] * len(problem.images) + pieces
        parts: list[str | ImageRef] = []
        for piece, image in zip(pieces, problem.images, strict=False):
            parts += [piece, image]
        parts.append(pieces[-1] + problem.asked.removeprefix(problem.question))
        user = Message(role="user", parts=tuple(part for part in parts if part != ""))
        head = (Message(role="system", parts=(system,)),) if system else ()
        return cls(id=problem.id, messages=(*head, user), index=index, turn=turn)

    @property
    def key(self) -> SampleKey:
        """What tells this request from all others of a run."""
        return self.id, self.index, self.turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a model answered to one request, or why it did not: then `stop` is `error`.

    `reasoning` is what some servers keep apart from the text. A `retryable` error may pass (a server that is
    down or busy); another one is final (the prompt is too long, the provider refuses). `tokens` are of the
    answer; `seconds` run from the first attempt, pauses included.
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
        """A failure says why; what was answered has no error."""
        failed = self.stop is StopReason.ERROR
        _require(failed == bool(self.error), f"stop {self.stop}, error {self.error!r}")
        _require(bool(self.error) or not self.retryable, "only a failure is retryable")

    @property
    def key(self) -> SampleKey:
        """The key of its request."""
        return self.id, self.index, self.turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled answer: ids (T,) with the stop id included, and the sampler's logprobs (T,)."""

    problem_id: str
    index: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason
    seed: int
    text: str
    policy_version: int = 0

    def __post_init__(self) -> None:
        """As many logprobs as ids, all finite and not above zero."""
        _require(len(self.ids) == len(self.logprobs), f"{len(self.ids)} ids, {len(self.logprobs)} logprobs")
        _require(all(math.isfinite(x) and x <= 0.0 for x in self.logprobs), "a logprob is not finite or > 0")
        _require(bool(self.ids) or self.stop is StopReason.ERROR, "only an error may be empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The unit of work: one problem, its rollouts (G,), their grades (G,) and advantages (G,)."""

    problem: Problem
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    grades: tuple[Grade, ...]
    advantages: tuple[float | None, ...]

    def __post_init__(self) -> None:
        """Lengths agree; unscored members, and only they, have no advantage."""
        _require(
            len(self.rollouts) == len(self.grades) == len(self.advantages),
            f"{len(self.rollouts)} rollouts, {len(self.grades)} grades, {len(self.advantages)} advantages",
        )
        for grade, advantage in zip(self.grades, self.advantages, strict=True):
            _require(grade.scored or advantage is None, "an unscored rollout has an advantage")


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One answer under a trunk: ids (T,), loss weights (T,), and the sampler's logprobs (T,) if any."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """One weight (and logprob) a token."""
        _require(bool(self.ids), "a branch needs at least one token")
        _require(len(self.ids) == len(self.weights), "one weight a token")
        _require(self.logprobs is None or len(self.logprobs) == len(self.ids), "one logprob a token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A training example: one prompt (the trunk) and its answers (the branches)."""

    prompt: Prompt
    branches: tuple[Branch, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the language model: the trunk once, every branch once."""
        return len(self.prompt.ids) + sum(len(b.ids) for b in self.branches)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one training step did. `values` are averages, `seconds` wall time a phase."""

    stage: str
    step: int
    steps: int
    values: Mapping[str, float] = field(hash=False, metadata=MERGED)
    seconds: Mapping[str, float] = field(hash=False)
    skipped: str = ""

    def __post_init__(self) -> None:
        """JSON has no NaN: every number is finite."""
        for name, value in (*self.values.items(), *self.seconds.items()):
            _require(math.isfinite(value), f"{name} is {value}")


def rollout_seed(run_seed: int, step: int, problem_id: str, index: int) -> int:
    """The seed of one rollout, below 2**63: it depends on what is asked, not on what ran before.

    A problem that is asked again in the same step goes on with the next indices (`Prompt.repeat`).
    """
    key = f"{run_seed}|{step}|{problem_id}|{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


# ---------------------------------------------------------------------------------- JSON rows

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}


def to_row(record: Any) -> dict[str, Any]:
    """Make the JSON row of a record: one entry a field, also where a field has its default."""
    row: dict[str, Any] = {}
    for each in fields(record):
        value, name = _plain(getattr(record, each.name)), _row_name(each)
        entries = {name: value} if name else value
        twice = sorted(row.keys() & entries.keys())
        _require(not twice, f"two fields of one row are named {', '.join(twice)}")
        row |= entries
    return row


def from_row(kind: type[T], row: Mapping[str, object]) -> T:
    """Make the record of a JSON row. Raises ValueError saying which field is missing, odd or unknown."""
    return _read_record(kind, row, lenient=False)


def from_row_or_none(kind: type[T], row: Mapping[str, object]) -> T | None:
    """Make the record of a JSON row, or None where it cannot be read; unknown fields are ignored."""
    try:
        return _read_record(kind, row, lenient=True)
    except ValueError:
        return None


def _row_name(each: "Field[Any]") -> str:
    """The field's name in the row; empty for a field whose entries are merged into it."""
    return str(each.metadata.get("row", each.name))


def _plain(value: Any) -> Any:
    """The value as JSON has it: records and mappings as objects, tuples as lists, bytes as Base64."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if isinstance(value, Enum):
        return value.value
    return to_row(value) if is_dataclass(value) else value


def _read_record(kind: type[T], row: Mapping[str, object], *, lenient: bool) -> T:
    left, values = dict(row), dict[str, Any]()
    every: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]
    for each in sorted(every, key=lambda one: not _row_name(one)):  # what is merged takes from the rest
        name = _row_name(each)
        if not name:
            own = {_row_name(one) for one in fields(each.type)} if is_dataclass(each.type) else set(left)
            entry: Any = {key: left.pop(key) for key in own & left.keys()}
        elif name in left:
            entry = left.pop(name)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
        else:
            continue
        values[each.name] = _read_value(each.type, entry, name, lenient=lenient)
    _require(lenient or not left, f"unknown fields: {', '.join(left)}")
    return kind(**values)


def _read_value(kind: Any, value: Any, name: str, *, lenient: bool) -> Any:
    """The value as a field annotated with `kind` holds it. Raises ValueError naming the field."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_option(options, value, name, lenient=lenient)
    if origin is tuple and isinstance(value, list):
        kinds = options[:1] * len(value) if options[1:] == (...,) else options
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_read_value(k, entry, f"{name}[{i}]", lenient=lenient) for i, (k, entry) in pairs)
    elif origin is Mapping and isinstance(value, dict):
        return _read_mapping(options[1], value, name, lenient=lenient)
    elif is_dataclass(kind) and isinstance(value, dict):
        try:
            return _read_record(cast(type[Any], kind), value, lenient=lenient)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
    elif kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # neither NaN nor infinite
            return float(value)
    elif kind is bytes and isinstance(value, str):
        return b64decode(value, validate=True)
    elif isinstance(kind, type) and issubclass(kind, Enum) and value in [each.value for each in kind]:
        return kind(value)
    elif kind is Any or type(value) is kind or (origin is Literal and value in options):
        return value
    shown = repr(value)
    raise ValueError(f"{name} must be {_wanted(kind)}, not {shown[:40]}{'...' if len(shown) > 40 else ''}")


def _read_option(options: tuple[Any, ...], value: Any, name: str, *, lenient: bool) -> Any:
    """The value as the first annotation of a union that takes it; a lone one beside None says why not."""
    if value is None and NoneType in options:
        return None
    real = [option for option in options if option is not NoneType]
    for option in real[:-1]:
        try:
            return _read_value(option, value, name, lenient=lenient)
        except ValueError:
            continue
    return _read_value(real[-1], value, name, lenient=lenient)


def _read_mapping(kind: Any, value: dict[str, Any], name: str, *, lenient: bool) -> dict[str, Any]:
    read = {}
    for key, entry in value.items():
        try:
            read[key] = _read_value(kind, entry, f"{name}.{key}".lstrip("."), lenient=lenient)
        except ValueError:
            if not lenient:
                raise
    return read


def _wanted(kind: Any) -> str:
    """What an annotation asks for, in words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(each.value for each in kind)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _WORDS.get(kind) or ("a list" if get_origin(kind) is tuple else "an object")
