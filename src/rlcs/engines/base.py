"""What every rollout engine offers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from rlcs.errors import DataError
from rlcs.model.chat import Chat
from rlcs.records import Problem, Prompt, Rollout, Sampling

Progress = Callable[[int], None] | None
"""Called with the number of rollouts that have finished since the last call."""

Answered = tuple[Prompt, tuple[Rollout, ...]] | DataError
"""A problem's prompt and answers, or why it cannot be asked."""


class Engine(Protocol):
    """Samples from the current policy."""

    def sync(self) -> None:
        """Take over the policy's weights as they are now."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0, progress: Progress = None
    ) -> list[tuple[Rollout, ...]]:
        """`sampling.n` rollouts of every prompt, in the order of the prompts.

        Rollout i of a prompt depends on (sampling.seed, step, problem id, repeat, i) and the policy alone.
        Under `torchrun` all ranks must call this together, each with its own prompts (or none).
        """
        ...


def ask(
    engine: Engine, chat: Chat, problems: Sequence[Problem], sampling: Sampling, *, step: int = 0
) -> list[Answered]:
    """What an engine says to each problem, in their order."""
    found: list[Prompt | DataError] = []
    for problem in problems:
        try:
            found.append(chat.prompt(problem))
        except DataError as error:
            found.append(error)
    prompts = [each for each in found if isinstance(each, Prompt)]
    groups = iter(engine.sample(prompts, sampling, step=step))
    return [(each, next(groups)) if isinstance(each, Prompt) else each for each in found]
