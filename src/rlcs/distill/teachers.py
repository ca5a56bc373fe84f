"""Who is asked: the program that drew the problem, a server, or a model in this process.

All take requests lazily and yield what was said as it comes, in no order. A request that could not be
answered comes back with its `error`; `again` says whether asking once more may help.
"""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from rlcs.distill.tries import Said
from rlcs.engines.endpoint import EndpointClient, Request, user_parts
from rlcs.errors import DataError
from rlcs.interrupts import StopFlag
from rlcs.recipe.schema import Teacher
from rlcs.records import Message, Problem, rollout_seed
from rlcs.tasks import chains

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


def open_voice(teacher: Teacher, *, system: str, seed: int) -> AbstractContextManager[Voice]:
    """The teacher of a recipe, as a context. Raises EndpointError or ModelError."""
    if teacher.who == "endpoint":
        return _EndpointVoice(teacher, system=system, seed=seed)
    if teacher.who == "local":
        return nullcontext(_LocalVoice(teacher, system=system, seed=seed))
    return nullcontext(_BuiltinVoice(teacher, seed=seed))


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
                again = got.attempts > self._teacher.max_retries
                yield [Failed(asked=asked, error=got.error, again=again)]
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
    """A model in this process, with its own pixel bounds and its own context length."""

    def __init__(self, teacher: Teacher, *, system: str, seed: int) -> None:
        from rlcs import models
        from rlcs.engines.local import LocalEngine
        from rlcs.recipe.schema import Images, Model, Prompts, Recipe

        vlm = models.load(Model(name=str(teacher.model)))
        size = vlm.processor.image_processor.size
        context = int(vlm.model.config.get_text_config().max_position_embeddings)
        recipe = Recipe(
            prompt=Prompts(system=system or None, max_tokens=max(1, context - teacher.max_tokens)),
            images=Images(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]),
        )
        self._teacher, self._seed = teacher, seed
        self._chat = models.make_chat(vlm, recipe)
        self._engine = LocalEngine(vlm, self._chat, max_rows=teacher.concurrency)

    def answers(self, requests: Iterator[Asked], stop: StopFlag | None) -> Iterator[list[Reply]]:
        while (some := list(itertools.islice(requests, self._teacher.concurrency))) and not (
            stop and stop.is_set
        ):
            for step, alike in itertools.groupby(sorted(some, key=_step), key=_step):
                yield self._sample(list(alike), step)

    def _sample(self, some: list[Asked], step: int) -> list[Reply]:
        """Requests of one try and turn; an answer depends on these, the seed and the problem alone."""
        teacher, replies, prompts = self._teacher, list[Reply](), []
        open_requests: dict[str, Asked] = {}
        for asked in some:
            try:
                prompts.append(self._chat.prompt(asked.problem))
                open_requests[asked.problem.id] = asked
            except DataError as error:
                replies.append(Failed(asked=asked, error=str(error), again=False))
        sampling = self._chat.sampling(
            temperature=teacher.temperature,
            top_p=teacher.top_p,
            max_new_tokens=teacher.max_tokens,
            seed=self._seed,
        )
        for prompt, (rollout,) in zip(
            prompts, self._engine.sample(prompts, sampling, step=step), strict=True
        ):
            asked = open_requests[rollout.problem_id]
            stop = "length" if rollout.stop == "length" else "stop"
            tokens = (len(prompt.ids), len(rollout.ids))
            replies.append((asked, _said(asked, rollout.text, stop=stop, tokens=tokens)))
        return replies
