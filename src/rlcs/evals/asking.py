"""Who answers: a model that we load, or one behind an OpenAI-compatible server.

Both take problems with the sample numbers that are still wanted, and yield rows as they come. A row
that says `stop: failed` was not answered (the server could not) and is asked again another time; one
that says `stop: error` never can be (its prompt is too long for the model) and counts as wrong.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlcs.engines.base import Answered
from rlcs.engines.factory import Reader
from rlcs.engines.openai_client import EndpointClient, Request, user_parts
from rlcs.errors import DataError
from rlcs.evals.benchmarks.base import Style
from rlcs.recipe.schema import Eval, Prompts
from rlcs.records import Message, Problem, rollout_seed
from rlcs.signals import StopFlag

BOXED_SYSTEM = Prompts().system
"""The paper's system prompt."""

Wanted = Sequence[tuple[Problem, tuple[int, ...]]]
"""Problems as asked, each with the sample numbers that have no answer yet."""
AnswerRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How every question is asked: `samples` answers each, in the words of `style`."""

    sampling: Eval
    style: Style = "paper"
    samples: int = 1
    seed: int = 0

    @property
    def system(self) -> str | None:
        """The official scripts send no system prompt (a chat template may add its own)."""
        return BOXED_SYSTEM if self.style == "paper" else None


class Respondent(Protocol):
    """Answers problems."""

    def answers(self, wanted: Wanted, *, stop: StopFlag) -> Iterator[list[AnswerRow]]:
        """Rows of `predictions.jsonl` as they come; ends early when `stop` is set."""
        ...


def answer_row(problem: str, index: int, text: str, *, tokens: int, stop: str, error: str = "") -> AnswerRow:
    """One answer: `stop` is eos, length, error or failed (see above)."""
    return {"id": problem, "index": index, "response": text, "tokens": tokens, "stop": stop, "error": error}


class LocalRespondent:
    """A model that we load, or that a vLLM of ours does."""

    def __init__(self, reader: Reader) -> None:
        """`reader` is open while this is used."""
        self._reader = reader

    def answers(self, wanted: Wanted, *, stop: StopFlag) -> Iterator[list[AnswerRow]]:
        """`reader.at_once` answers at a time."""
        chunk = max(1, self._reader.at_once // self._reader.sampling.n)
        for start in range(0, len(wanted), chunk):
            if stop.is_set:
                return
            some = wanted[start : start + chunk]
            answers = zip(some, self._reader.ask([problem for problem, _ in some]), strict=True)
            yield [_row(problem, index, said) for (problem, left), said in answers for index in left]


def _row(problem: Problem, index: int, answer: Answered) -> AnswerRow:
    if isinstance(answer, DataError):
        return answer_row(problem.id, index, "", tokens=0, stop="error", error=str(answer))
    said = answer[1][index]
    return answer_row(problem.id, index, said.text, tokens=len(said.ids), stop=said.stop.value)


class EndpointRespondent:
    """A model behind a server."""

    def __init__(self, client: EndpointClient, asking: Asking) -> None:
        """`client` is open while this is used."""
        self._client = client
        self._asking = asking

    def answers(self, wanted: Wanted, *, stop: StopFlag) -> Iterator[list[AnswerRow]]:
        """One row at a time."""
        requests = (self._request(problem, index) for problem, indices in wanted for index in indices)
        for got in self._client.ask(requests, stop=stop):
            stops = {"stop": "eos", "length": "length", "error": "failed"}
            yield [
                answer_row(
                    got.id,
                    got.index,
                    got.text,
                    tokens=got.completion_tokens,
                    stop=stops[got.finish],
                    error=got.error,
                )
            ]

    def _request(self, problem: Problem, index: int) -> Request:
        asking = self._asking
        head = (Message(role="system", parts=(asking.system,)),) if asking.system else ()
        return Request(
            id=problem.id,
            index=index,
            messages=(*head, Message(role="user", parts=user_parts(problem))),
            temperature=asking.sampling.temperature,
            top_p=asking.sampling.top_p,
            max_tokens=asking.sampling.max_new_tokens,
            seed=rollout_seed(asking.seed, 0, problem.id, index) >> 32,  # some servers take 31 bits
        )
