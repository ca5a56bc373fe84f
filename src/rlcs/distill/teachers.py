"""Opens the teacher of a recipe as a sampler: the built-in program, a server, or a local model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rlcs.data import puzzles
from rlcs.generation import Sampler, open_sampler
from rlcs.recipe.schema import Images, Teacher
from rlcs.records import Problem, Request, Sample, Sampling, StopReason, rollout_seed
from rlcs.signals import StopFlag


def open_teacher(
    teacher: Teacher, problems: Mapping[str, Problem], images: Images, *, seed: int, logs: Path
) -> AbstractContextManager[Sampler]:
    """Open the teacher for some problems, by id; `logs` is the folder for vLLM's logs.

    A server sees the problems' images as the student does: within the pixels of `images`.

    Entering the context raises EndpointError, ModelError or UserError.
    """
    if teacher.who == "builtin":
        return nullcontext(BuiltinTeacher(teacher, problems, seed=seed))
    sampling = Sampling(
        temperature=teacher.temperature, top_p=teacher.top_p, max_new_tokens=teacher.max_tokens, seed=seed
    )
    model = teacher.endpoint if teacher.who == "endpoint" else str(teacher.model)
    return open_sampler(
        model, sampling, settings=teacher.rollout, rows=teacher.concurrency, logs=logs, images=images
    )


class BuiltinTeacher:
    """The built-in teacher: the program that drew the problems and can solve them."""

    def __init__(self, teacher: Teacher, problems: Mapping[str, Problem], *, seed: int) -> None:
        """Take the problems by id, by which requests refer to them."""
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
