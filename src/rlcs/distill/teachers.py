"""Who is asked: the program that drew the problem, a server, or a model that we load.

All take requests lazily and yield what was said as it comes, in no order. A request that could not be
answered comes back with its `error`; `again` says whether asking once more may help.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlcs.data.puzzles import chains
from rlcs.distill.tries import Said
from rlcs.recipe.schema import Teacher
from rlcs.records import Problem, Request, Sampling, rollout_seed
from rlcs.signals import StopFlag

if TYPE_CHECKING:
    from rlcs.generation import Sampler

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
    if teacher.who != "builtin":
        from rlcs.generation import open_sampler

        how = Sampling(
            temperature=teacher.temperature,
            top_p=teacher.top_p,
            max_new_tokens=teacher.max_tokens,
            seed=seed,
        )
        model = teacher.endpoint if teacher.who == "endpoint" else str(teacher.model)
        with open_sampler(
            model, how, settings=teacher.rollout, rows=teacher.concurrency, logs=logs
        ) as sampler:
            yield _SamplerVoice(sampler, system)
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


class _SamplerVoice:
    """A model, wherever it is."""

    def __init__(self, sampler: "Sampler", system: str) -> None:
        self._sampler, self._system = sampler, system

    def answers(self, requests: Iterator[Asked], stop: StopFlag | None) -> Iterator[list[Reply]]:
        under_way: dict[object, Asked] = {}

        def sent() -> Iterator[Request]:
            for asked in requests:
                place = {"index": asked.attempt, "turn": asked.turn}
                request = Request.of(asked.problem, system=self._system, **place)
                under_way[request.key] = asked
                yield request

        for got in self._sampler.samples(sent(), stop=stop):
            asked = under_way.pop(got.key)
            if got.error:
                yield [Failed(asked=asked, error=got.error, again=got.retryable)]
                continue
            said = _said(asked, got.text, stop=got.stop.value, tokens=(got.prompt_tokens, got.tokens))
            yield [(asked, replace(said, reasoning=got.reasoning, seconds=got.seconds))]
