"""What a teacher may cost: counts tokens and money, and says when no further answer may be requested."""

import math

from rlcs.recipe.schema import Teacher


class Budget:
    """The tokens of a distillation so far, and whether another answer fits.

    Answers under way are expected to be like those that have come, and the first is waited for, so that
    requests at the same time do not exceed the limits by more than about one answer.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._tokens = (0, 0)
        self._answers = self._under_way = 0

    @property
    def cost(self) -> float:
        """The cost so far, in the currency of the prices; 0 without any price."""
        return self._teacher.cost(*self._tokens) or 0.0

    def request(self) -> None:
        """Count an answer that is requested."""
        self._under_way += 1

    def arrive(self) -> None:
        """Count the end of a request, answered or not."""
        self._under_way -= 1

    def spend(self, prompt: int, completion: int, *, answers: int = 1) -> None:
        """Count tokens that are paid, of this run or an earlier one."""
        self._tokens = (self._tokens[0] + prompt, self._tokens[1] + completion)
        self._answers += answers

    @property
    def is_left(self) -> bool:
        """Whether another answer may be requested."""
        if not self._limits:
            return True
        share = max(spent / limit for spent, limit in self._limits)
        expected = share / self._answers * (self._under_way + 1) if self._answers else math.inf
        return share < 1 and (not self._under_way or share + expected <= 1)

    @property
    def _limits(self) -> list[tuple[float, float]]:
        """What is spent, and the most that may be, for each limit."""
        teacher = self._teacher
        pairs = ((sum(self._tokens), teacher.token_budget), (self.cost, teacher.cost_budget))
        return [(spent, limit) for spent, limit in pairs if limit is not None]

    @property
    def reached(self) -> str:
        """Which limit is reached, in words; "" while none is."""
        tokens, cost = sum(self._tokens), self._teacher.cost_budget
        if self._teacher.token_budget is not None and tokens >= self._teacher.token_budget:
            return f"{tokens:,} tokens are spent, of teacher.token_budget={self._teacher.token_budget}"
        if cost is not None and self.cost >= cost:
            return f"{self.cost:.4g} is spent, of teacher.cost_budget={cost:g}"
        return ""
