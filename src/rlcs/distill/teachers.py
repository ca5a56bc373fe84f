"""Who is asked: the program that drew the problem, a server, or a model that we load.

All take requests lazily and yield what was said as it comes, in no order. A request that could not be
answered comes back with its `error`; `again` says whether asking once more may help.
"""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlcs.data.puzzles import chains
from rlcs.distill.tries import Said
from rlcs.engines.openai_client import EndpointClient, Request, user_parts
from rlcs.errors import DataError
from rlcs.recipe.schema import Eval, Teacher
from rlcs.records import Message, Problem, rollout_seed
from rlcs.signals import StopFlag

if TYPE_CHECKING:
    from rlcs.engines.base import Answered
    from rlcs.engines.factory import Reader

_MOST_TURNS = 10
_SEPARATOR = "\x1f"  # between a problem's id and the number of a turn in a request's id


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request: turn `turn` of try `attempt`; `problem` carries the words that are sent."""

    problem: Problem
    attempt: int
    turn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A request without an answer, and why."""

    asked: Asked
    error: str
    again: bool


Reply = tuple[Asked, Said] | Failed


class Voice(Protocol):
    """Answers requests."""

    def answers(self, requests: Iterator[Asked], stop: StopFlag | None) -> Iterator[list[Reply]]:
        """What was said, some at a time; ends early when `stop` is set."""
        ...


@contextmanager
def open_voice(teacher: Teacher, *, system: str, seed: int, logs: Path) -> Iterator[Voice]:
    """The teacher of a recipe; `logs` is for those of a vLLM. Raises EndpointError, ModelError, UserError."""
    if teacher.who == "endpoint":
        with _EndpointVoice(teacher, system=system, seed=seed) as voice:
            yield voice
    elif teacher.who == "local":
        from rlcs.engines.factory import open_reader

        how = Eval(
            temperature=teacher.temperature,
            top_p=teacher.top_p,
            max_new_tokens=teacher.max_tokens,
            max_rows=teacher.concurrency,
        )
        words, name = system or None, str(teacher.model)
        with open_reader(name, teacher.rollout, how, system=words, seed=seed, logs=logs) as reader:
            yield _LocalVoice(reader)
    else:
        yield _BuiltinVoice(teacher, seed=seed)


def _step(asked: Asked) -> int:
    """A number for each turn of each try, for seeds."""
    return asked.attempt * _MOST_TURNS + asked.turn


def _said(asked: Asked, text: str, *, stop: str = "stop", tokens: tuple[int, int] = (0, 0)) -> Said:
    return Said(
        id=asked.problem.id,
        attempt=asked.attempt,
        turn=asked.turn,
        response=text,
        stop=stop,
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
    )


class _BuiltinVoice:
    """The program that drew the problem."""

    def __init__(self, teacher: Teacher, *, seed: int) -> None:
        self._teacher, self._seed = teacher, seed

    def answers(self, requests: Iterator[Asked], stop: StopFlag | None) -> Iterator[list[Reply]]:
        while (some := list(itertools.islice(requests, 256))) and not (stop and stop.is_set):
            yield [(asked, self._say(asked)) for asked in some]

    def _say(self, asked: Asked) -> Said:
        problem, teacher = asked.problem, self._teacher
        seed = rollout_seed(self._seed, asked.attempt, problem.id, 0)
        text = chains.teach(problem, chain=teacher.chain, seed=seed, wrong_share=teacher.wrong_share)
        return _said(asked, text)


class _EndpointVoice(AbstractContextManager["_EndpointVoice"]):
    """A model behind an OpenAI-compatible server."""

    def __init__(self, teacher: Teacher, *, system: str, seed: int) -> None:
        self._client = EndpointClient(teacher.endpoint)
        self._teacher, self._system, self._seed = teacher, system, seed

    def __enter__(self) -> "_EndpointVoice":
        self._client.__enter__()
        return self

    def __exit__(self, *about: object) -> None:
        self._client.__exit__(None, None, None)

    def answers(self, requests: Iterator[Asked], stop: StopFlag | None) -> Iterator[list[Reply]]:
        open_requests: dict[tuple[str, int], Asked] = {}

        def sent() -> Iterator[Request]:
            for asked in requests:
                request = self._request(asked)
                open_requests[request.id, request.index] = asked
                yield request

        for got in self._client.ask(sent(), stop=stop):
            asked = open_requests.pop((got.id, got.index))
            if got.finish == "error":
                yield [Failed(asked=asked, error=got.error, again=not got.refused)]
                continue
            tokens = (got.prompt_tokens, got.completion_tokens)
            said = _said(asked, got.text, stop=got.finish, tokens=tokens)
            yield [(asked, replace(said, reasoning=got.reasoning, seconds=round(got.seconds, 3)))]

    def _request(self, asked: Asked) -> Request:
        teacher = self._teacher
        head = (Message(role="system", parts=(self._system,)),) if self._system else ()
        seed = rollout_seed(self._seed, _step(asked), asked.problem.id, 0)
        return Request(
            id=f"{asked.problem.id}{_SEPARATOR}{asked.turn}",
            index=asked.attempt,
            messages=(*head, Message(role="user", parts=user_parts(asked.problem))),
            temperature=teacher.temperature,
            top_p=teacher.top_p,
            max_tokens=teacher.max_tokens,
            seed=seed >> 32,  # some servers take 31 bits
        )


class _LocalVoice:
    """A model that we load, or that a vLLM of ours does."""

    def __init__(self, reader: "Reader") -> None:
        self._reader = reader

    def answers(self, requests: Iterator[Asked], stop: StopFlag | None) -> Iterator[list[Reply]]:
        at_once = self._reader.at_once
        while (some := list(itertools.islice(requests, at_once))) and not (stop and stop.is_set):
            # An answer depends on its try and turn, the seed and the problem alone.
            for step, group in itertools.groupby(sorted(some, key=_step), key=_step):
                alike = list(group)
                answers = self._reader.ask([asked.problem for asked in alike], step=step)
                yield [_reply(asked, answer) for asked, answer in zip(alike, answers, strict=True)]


def _reply(asked: Asked, answer: "Answered") -> Reply:
    if isinstance(answer, DataError):
        return Failed(asked=asked, error=str(answer), again=False)
    prompt, (rollout,) = answer
    stop = "length" if rollout.stop == "length" else "stop"
    return asked, _said(asked, rollout.text, stop=stop, tokens=(len(prompt.ids), len(rollout.ids)))
