"""Answers while they are being decoded: those that have said the same so far are one branch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from rlcs.engines.detokenizer import Detokenizer
from rlcs.records import Prompt, Sampling, StopReason

Likeliest = tuple[tuple[int, float], ...]
"""The most likely ids in a place, each with its logprob."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of answer `index` and the text that it completes; `stop` is set on the last one.

    `likeliest` are the ids that were most likely in its place, with their logprobs, if they were requested.
    """

    index: int
    id: int
    logprob: float
    text: str
    stop: StopReason | None
    likeliest: Likeliest = ()


Listener = Callable[[Token | Exception], None]
"""Called with every token, in the thread that decodes; an exception means that the request failed, and is
the last call."""


@dataclass(eq=False, kw_only=True, slots=True)
class DecodeRequest:
    """`sampling.n` answers to one prompt; each ends before any of the `stops`, which need a listener.

    The listener gets the `num_likeliest` most likely tokens beside each token.
    """

    prompt: Prompt
    sampling: Sampling
    step: int = 0
    stops: tuple[str, ...] = ()
    num_likeliest: int = 0
    listener: Listener | None = None
    cancelled: bool = False
    rows: list["Row"] = field(default_factory=list, repr=False)
    routes: bytes = b""
    number: int = field(init=False)
    """Stands for the problem and the prompt's words in drafts: above the ids of all tokens."""

    def __post_init__(self) -> None:
        """Number the problem and the prompt's words."""
        question = crc32(self.prompt.problem_id.encode(errors="replace")), self.prompt.ids
        self.number = 1 << 40 | hash(question) & 0xFFFFFFFF

    @property
    def max_tokens(self) -> int:
        """The longest that prompt and answer can become."""
        return len(self.prompt.ids) + self.sampling.max_new_tokens

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return bool(self.rows) and all(row.stop is not None for row in self.rows)

    def cancel(self) -> None:
        """Remove the request from the batch at the next step. From any thread."""
        self.cancelled = True


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """One answer. What it has said is in its branch, which others may share."""

    index: int
    seed: int
    branch: "Branch"
    detokenizer: Detokenizer
    stop: StopReason | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self.branch.ids

    @property
    def logprobs(self) -> list[float]:
        """Their logprobs."""
        return self.branch.logprobs

    @property
    def routes(self) -> list[bytes]:
        """The experts that computed each of them but the last, if they are kept."""
        return self.branch.routes


@dataclass(eq=False, kw_only=True, slots=True)
class Branch:
    """The answers to a request that have said the same so far; `start` is the position of their first token.

    `fed` are the experts that computed the tokens of the last pass.
    """

    request: DecodeRequest
    start: int
    rows: list[Row] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[bytes] = field(default_factory=list)
    draft: Sequence[int] = ()
    fed: Sequence[bytes] = ()

    @property
    def ended(self) -> bool:
        """Whether its answers have ended; they end together."""
        return self.rows[0].stop is not None

    def parted(self, rows: list[Row]) -> "Branch":
        """A branch of those of its rows that go on in their own way."""
        branch = Branch(
            request=self.request,
            start=self.start,
            rows=rows,
            ids=self.ids.copy(),
            logprobs=self.logprobs.copy(),
            routes=self.routes.copy(),
        )
        for row in rows:
            row.branch = branch
        return branch

    def take(self, token: int, logprob: float, likeliest: Likeliest = ()) -> None:
        """Append a token, decide whether the answers end with it, and report it to the listener."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        sampling, listener = self.request.sampling, self.request.listener
        stop = None
        if token in sampling.stop_ids:
            stop = StopReason.EOS
        elif len(self.ids) >= sampling.max_new_tokens:
            stop = StopReason.LENGTH
        for row in self.rows:
            row.stop = stop
            if listener is None:
                continue
            text = "" if stop is StopReason.EOS else row.detokenizer.feed(token)
            if row.detokenizer.stopped:
                row.stop = StopReason.EOS
            elif stop is not None:
                text += row.detokenizer.flush()
            listener(
                Token(
                    index=row.index,
                    id=token,
                    logprob=logprob,
                    text=text,
                    stop=row.stop,
                    likeliest=likeliest,
                )
            )
