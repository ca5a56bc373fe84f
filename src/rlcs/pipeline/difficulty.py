"""Measures how often a model solves each problem of a data source, before RL, and writes it into the rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlcs.data.blind import blind_twins
from rlcs.data.good_rows import require_new_file, write_rows
from rlcs.data.loading import load, require_usable
from rlcs.distributed import ALONE
from rlcs.engines.factory import open_engines
from rlcs.evals import CHUNK
from rlcs.evals.arms import Evaluator, grade_samples
from rlcs.evals.intervals import wilson
from rlcs.evals.scores import mean, pass_at, with_interval
from rlcs.generation import EngineSampler, SampleLog
from rlcs.model import loading
from rlcs.pipeline.graders import open_graders
from rlcs.pipeline.study import engine_needs
from rlcs.progress import screen
from rlcs.recipe.schema import Recipe
from rlcs.records import Problem, Request, to_row
from rlcs.signals import StopFlag
from rlcs.storage.locks import hold

_INNER_BINS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Difficulty:
    """Pass rates of the problems of a source: `counts` are (scored, right) answers by problem id.

    With `blind` the model saw another problem's image; problems without any are unmeasured.
    """

    counts: Mapping[str, tuple[int, int]]
    samples: int
    group_size: int
    unmeasured: int
    blind: bool = False

    def columns(self, name: str) -> dict[str, Any]:
        """The values for a problem's row, as in distillation's problems.jsonl, and a 95% interval."""
        scored, right = self.counts[name]
        low, high = (round(bound, 4) for bound in wilson(right, scored))
        rate = round(right / scored, 4) if scored else None
        if self.blind:
            return {"blind_samples": scored, "blind_right": right, "blind_rate": rate}
        return {
            "samples": scored,
            "right": right,
            "pass_rate": rate,
            "pass_rate_low": low if scored else None,
            "pass_rate_high": high if scored else None,
        }

    def summary(self) -> dict[str, Any]:
        """The mean pass rate, the problems by pass rate, and how many groups would have a signal.

        The share of groups with a signal is unbiased: over all choices of `group_size` among a problem's
        answers (or of all of them, where they are fewer), those that are neither all right nor all wrong.
        """
        known = [(scored, right) for scored, right in self.counts.values() if scored]
        size = min(self.group_size, self.samples)
        signals = [
            pass_at(n, right, min(size, n)) + pass_at(n, n - right, min(size, n)) - 1 for n, right in known
        ]
        bins = Counter(_bin(right / scored) for scored, right in known)
        return {
            "problems": len(known),
            "unmeasured": self.unmeasured + len(self.counts) - len(known),
            "samples": self.samples,
            "pass_rate": mean([right / scored for scored, right in known]),
            "histogram": {name: bins[name] for name in _bin_names()},
            "group_size": size,
            "signal": with_interval(mean(signals), len(known)),
        }


def measure_difficulty(
    source: str,
    recipe: Recipe,
    out: Path,
    *,
    samples: int,
    stop: StopFlag,
    blind: bool = False,
    json: bool = False,
) -> Difficulty:
    """Sample `samples` answers to each problem as RL would, and write the rows with pass rates to `out`.

    Prompts, sampling, engine and the rule of what is right are those of the recipe's RL. Answers are kept in
    a folder beside the file, so that a stopped measurement goes on. `blind`: each problem is shown with
    another one's image, and the rate is its `blind_rate`. Raises DataError, UserError, Stopped.
    """
    require_new_file(out, source, option="--out")
    loaded = load(source, recipe.data, decode_limit=recipe.images.decode_limit, role="rl")
    require_usable(loaded, recipe.data)
    grpo, problems = recipe.grpo, [row.problem for row in loaded.rows]
    if blind:
        problems = [*blind_twins(problems, "other")]
    digests = {problem.id: problem.digest for problem in problems}
    folder = out.with_name(f"{out.stem}.answers")
    settings = {"model": recipe.model.name, "samples": samples, "seed": recipe.seed}
    settings |= {name: getattr(grpo, name) for name in ("temperature", "top_p", "max_new_tokens")}
    settings |= {"blind": "other"} if blind else {}
    settings |= {"prompt": recipe.prompt.model_dump(mode="json"), "reward": next(iter(grpo.reward.weights))}
    with hold(folder), SampleLog(folder / "samples.jsonl", digests, settings=settings) as log:
        answered = Counter(name for name, *_ in log.entries)
        left = [problem for problem in problems if answered[problem.id] < samples]
        if left:
            with (
                screen("difficulty", len(problems), json=json) as view,
                _evaluator(recipe, samples, folder) as it,
            ):
                size = max(1, CHUNK // samples)
                for start in range(0, len(left), size):
                    stop.check(str(folder))
                    _sample(it, left[start : start + size], samples, log)
                    view.advance(len(problems) - len(left) + min(len(left), start + size))
        verdicts = {name: Counter[bool | None]() for name in digests}
        for entry in log.entries.values():
            verdicts[entry.sample.id][entry.added["correct"]] += not entry.sample.error
    counts = {name: (each[True] + each[False], each[True]) for name, each in verdicts.items()}
    found = Difficulty(
        counts=counts,
        samples=samples,
        group_size=grpo.group_size,
        unmeasured=len(loaded.bad) + len(loaded.rows) - len(problems),
        blind=blind,
    )
    write_rows(
        loaded.rows, source, out, recipe.data.columns, added={name: found.columns(name) for name in counts}
    )
    return found


def lines(found: Difficulty) -> list[str]:
    """The summary for a reader."""
    facts = found.summary()
    widest = max(1, *facts["histogram"].values())
    bars = [
        f"  {name:<11} {count:>7,}  {'#' * round(40 * count / widest)}"
        for name, count in facts["histogram"].items()
    ]
    signal, saw = facts["signal"], " with another problem's image" if found.blind else ""
    without = f", {facts['unmeasured']:,} without an answer that could be graded" * bool(facts["unmeasured"])
    return [
        f"{facts['problems']:,} problems{without}; {facts['pass_rate']:.1%} of the answers are right{saw}",
        "pass rate    problems",
        *bars,
        f"groups of {facts['group_size']} with a signal: {signal['accuracy']:.1%} "
        f"[{signal['low']:.1%}, {signal['high']:.1%}]",
    ]


@contextmanager
def _evaluator(recipe: Recipe, samples: int, folder: Path) -> Iterator[Evaluator]:
    """The recipe's model with the prompts, the engine and the grader of its RL stage."""
    grpo = recipe.grpo
    vlm = loading.load(recipe.model)
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images, rl=True)
    sampling = chat.sampling(
        n=samples,
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        max_new_tokens=grpo.max_new_tokens,
        seed=recipe.seed,
    )
    with (
        open_engines(engine_needs(recipe), folder / "rollout") as make,
        open_graders(grpo.reward, ALONE, folder / "judge", only_correct=True) as (grader, _),
    ):
        sampler = EngineSampler(make(vlm, chat, grpo.max_rows), chat, sampling, batch_size=CHUNK)
        yield Evaluator(sampler=sampler, grader=grader)


def _sample(evaluator: Evaluator, problems: Sequence[Problem], samples: int, log: SampleLog) -> None:
    """Answer and grade some problems that are not answered, and keep the answers."""
    by_id = {problem.id: problem for problem in problems}
    requests = [Request.of(problem, index=index) for problem in problems for index in range(samples)]
    answers = evaluator.sampler.batch([*log.unanswered(requests)])
    for sample, grade in grade_samples(evaluator, [(by_id[each.id], each) for each in answers]):
        log.add(sample, to_row(grade))


def _bin_names() -> list[str]:
    edges = [index / _INNER_BINS for index in range(_INNER_BINS + 1)]
    return [
        "none right",
        *(f"{a:.0%} to {b:.0%}" for a, b in pairwise(edges)),
        "all right",
    ]


def _bin(rate: float) -> str:
    names = _bin_names()
    return names[0] if rate == 0 else names[-1] if rate == 1 else names[1 + int(rate * _INNER_BINS)]
