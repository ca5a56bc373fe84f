"""The teacher of a recipe as a sampler: the program that drew the problem, a server, or a model of ours."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rlcs.data import puzzles
from rlcs.generation import Sampler, open_sampler
from rlcs.recipe.schema import Teacher
from rlcs.records import Problem, Request, Sample, Sampling, StopReason, rollout_seed
from rlcs.signals import StopFlag


@contextmanager
def open_teacher(
    teacher: Teacher, problems: Mapping[str, Problem], *, seed: int, logs: Path
) -> Iterator[Sampler]:
    """Open the teacher for some problems, by id; `logs` is for vLLM's.

    Raises EndpointError, ModelError, UserError.
    """
    if teacher.who == "builtin":
        yield BuiltinTeacher(teacher, problems, seed=seed)
        return
    sampling = Sampling(
        temperature=teacher.temperature, top_p=teacher.top_p, max_new_tokens=teacher.max_tokens, seed=seed
    )
    model = teacher.endpoint if teacher.who == "endpoint" else str(teacher.model)
    with open_sampler(
        model, sampling, settings=teacher.rollout, rows=teacher.concurrency, logs=logs
    ) as sampler:
        yield sampler


class BuiltinTeacher:
    """The program that drew the problems: it knows how they are solved."""

    def __init__(self, teacher: Teacher, problems: Mapping[str, Problem], *, seed: int) -> None:
        """`problems` by their ids; requests say which one is meant."""
        self._teacher, self._problems, self._seed = teacher, problems, seed

    def samples(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Sample]:
        """See `Sampler.samples`. Raises DataError for a problem that is not built in."""
        for request in requests:
            seed = rollout_seed(self._seed, request.index, request.id, 0)
            text = puzzles.teach(
                self._problems[request.id],
                chain=self._teacher.chain,
                seed=seed,
                wrong_share=self._teacher.wrong_share,
            )
            yield request.sample(text=text, stop=StopReason.EOS)
            if stop is not None and stop.is_set:
                return
