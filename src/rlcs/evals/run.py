"""Models times benchmarks: ask what is not answered yet, grade by every rule, write, compare.

`OUT/<model>/<benchmark>/` holds `predictions.jsonl` (answers as they come; at the end with every
rule's verdict), `scores.json`, and `settings.json`, which keeps answers of another setting out.
"""

import hashlib
import json as jsonlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcs.distill.tries import claim
from rlcs.engines.factory import open_reader
from rlcs.engines.openai_client import EndpointClient
from rlcs.errors import UserError
from rlcs.evals.answer_extractor import NOTHING, Key, read_out, wants_judge
from rlcs.evals.answer_file import AnswerRow as Answered
from rlcs.evals.answer_file import mark_officially
from rlcs.evals.arms import answers_so_far
from rlcs.evals.asking import AnswerRow, Asking, EndpointRespondent, LocalRespondent, Respondent
from rlcs.evals.benchmarks import find
from rlcs.evals.benchmarks.loading import Loaded, load_benchmark
from rlcs.evals.comparison import write_comparison
from rlcs.evals.scores import Verdict, chance_level, rule_scores
from rlcs.grading import GradePool
from rlcs.progress import Screen, screen
from rlcs.recipe.rollout import EngineSettings
from rlcs.recipe.schema import Endpoint
from rlcs.records import Grade, Problem
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, atomic_write, write_json

OWN_RULE = "rlcs"
JUDGED_RULE = "rlcs+judge"
OFFICIAL_RULE = "official"
PREDICTIONS = "predictions.jsonl"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What is asked of every model, and where it goes.

    `endpoint` and `judge` are servers; the model name in `endpoint` is replaced by each model's own. Without
    `endpoint` we load the models, and `sampler` says by which engine.
    """

    benchmarks: tuple[str, ...]
    out: Path
    asking: Asking
    data: Path | None = None
    split: str | None = None
    limit: int | None = None
    endpoint: Endpoint | None = None
    judge: Endpoint | None = None
    sampler: EngineSettings = field(default_factory=EngineSettings)
    decode_limit: int = 50_000_000


def run_exam(exam: Exam, models: Sequence[str], *, stop: StopFlag, json: bool = False) -> dict[str, Any]:
    """Every model on every benchmark; returns the comparison, which also lies in OUT/comparison.json.

    A model is `NAME=MODEL` or just MODEL. Raises UserError before anything is asked if a name is taken
    twice or a benchmark cannot be read.
    """
    named = label_models(models)
    loaded = [
        load_benchmark(
            find(name), split=exam.split, data=exam.data, limit=exam.limit, decode_limit=exam.decode_limit
        )
        for name in dict.fromkeys(exam.benchmarks)
    ]
    for label, model in named.items():
        for each in loaded:
            claim(exam.out / label / each.benchmark.name, _settings(exam, each, model))
    with GradePool() as pool, EndpointClient(exam.judge) if exam.judge else nullcontext() as judge:
        for label, model in named.items():
            stop.check(str(exam.out))
            sittings = [_Sitting(exam, label, each, pool=pool, judge=judge) for each in loaded]
            _examine(exam, model, sittings, stop=stop, json=json)
    return write_comparison(exam.out, first=list(named))


def label_models(models: Sequence[str]) -> dict[str, str]:
    """Folder name to model. Raises UserError for two models of one name."""
    named: dict[str, str] = {}
    for text in models:
        label, equals, model = text.partition("=")
        if not equals:
            parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".", "..")]
            label, model = "-".join(parts[-3:]), text
        if not re.fullmatch(r"[\w.+:@-]+", label) or label.startswith(".") or not model:
            raise UserError(f"{text!r} names no model", where="MODEL", fix="write NAME=MODEL, or a model")
        if label in named:
            raise UserError(
                f"two models are called {label!r}", where="MODEL", fix="give them names: NAME=MODEL"
            )
        named[label] = model
    return named


@contextmanager
def _respondent(exam: Exam, model: str) -> Iterator[Respondent]:
    how, logs = exam.asking, exam.out / "rollout"
    if exam.endpoint is not None:
        with EndpointClient(exam.endpoint.model_copy(update={"model": model})) as client:
            yield EndpointRespondent(client, how)
        return
    with open_reader(
        model, exam.sampler, how.sampling, system=how.system, seed=how.seed, n=how.samples, logs=logs
    ) as reader:
        yield LocalRespondent(reader)


def _settings(exam: Exam, loaded: Loaded, model: str) -> dict[str, Any]:
    """What decides an answer: answers of other settings never share a folder."""
    sampling = exam.asking.sampling
    return {
        "model": model,
        "weights": _weights_stamp(model) if exam.endpoint is None else None,
        "base_url": exam.endpoint.base_url if exam.endpoint else None,
        "engine": None if exam.endpoint or exam.sampler.engine == "local" else "vllm",
        "split": loaded.split,
        "prompt": exam.asking.style,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": exam.asking.seed,
    }


def _weights_stamp(model: str) -> str | None:
    """A mark of the weight files of a local folder: names, sizes, times. None for a hub id."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(jsonlib.dumps(facts).encode()).hexdigest()[:16] if facts else None


def _examine(exam: Exam, model: str, sittings: "list[_Sitting]", *, stop: StopFlag, json: bool) -> None:
    """One model before every benchmark; it is gone from memory before the next one is loaded."""
    with _respondent(exam, model) as respondent:
        for sitting in sittings:
            sitting.hold(respondent, stop, json=json)


class _Sitting:
    """One model before one benchmark."""

    def __init__(
        self, exam: Exam, label: str, loaded: Loaded, *, pool: GradePool, judge: EndpointClient | None
    ) -> None:
        self._exam, self._label, self._loaded = exam, label, loaded
        self._pool, self._judge = pool, judge
        self._samples = exam.asking.samples
        self._questions = {question.id: question for question, _ in loaded.questions}
        self._folder = exam.out / label / loaded.benchmark.name

    def hold(self, respondent: Respondent, stop: StopFlag, *, json: bool) -> None:
        """Ask, grade, write. Raises Stopped with everything answered on disk."""
        title = f"{self._label}: {self._loaded.benchmark.title}"
        with screen(title, len(self._questions) * self._samples, json=json) as view:
            if self._loaded.missing:
                view.say(missing_text(self._loaded))
            rows, failed = self._ask(respondent, view, stop)
            stop.check(str(self._folder))
            current = [r for r in rows if r["id"] in self._questions and r["index"] < self._samples]
            rules, judged = self._grade(current, stop)
            stop.check(str(self._folder))
            lines = "".join(jsonlib.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write(self._folder / PREDICTIONS, lines)
            write_json(
                self._folder / "scores.json", {**self._scores(current, rules, failed), "judge": judged}
            )
            for why in list(dict.fromkeys(failed.values()))[:_SHOWN]:
                view.say(f"  not answered: {why}")

    def _ask(
        self, respondent: Respondent, view: Screen, stop: StopFlag
    ) -> tuple[list[AnswerRow], dict[str, str]]:
        """All rows, old and new, and for each (question, sample) that could not be answered why."""
        path = self._folder / PREDICTIONS
        style = self._exam.asking.style
        problems = [question.asked(style, images) for question, images in self._loaded.questions]
        digests = {problem.id: problem.digest for problem in problems}
        rows: list[AnswerRow] = answers_so_far(path, digests)
        answered = {(row["id"], row["index"]) for row in rows}
        wanted: list[tuple[Problem, tuple[int, ...]]] = []
        for problem in problems:
            left = tuple(i for i in range(self._samples) if (problem.id, i) not in answered)
            if left:
                wanted.append((problem, left))
        done = len(self._questions) * self._samples - sum(len(left) for _, left in wanted)
        failed: dict[str, str] = {}
        right = seen = 0
        for new in respondent.answers(wanted, stop=stop):
            good = [{**row, "digest": digests[row["id"]]} for row in new if row["stop"] != "failed"]
            failed |= {f"{r['id']} #{r['index']}": r["error"] for r in new if r["stop"] == "failed"}
            append_jsonl(path, good)
            rows += good
            right += sum(grade.correct is True for grade in self._graded(good))
            seen += len(good)
            view.advance(done + seen + len(failed), accuracy=right / max(1, seen))
        return rows, failed

    def _graded(self, rows: Sequence[AnswerRow], said: Mapping[Key, str] | None = None) -> list[Grade]:
        """By our own rule; what a judge `said` of a response stands in its place."""
        answers = []
        for row in rows:
            text = (said or {}).get((row["id"], row["index"]), NOTHING)
            response = row["response"] if text == NOTHING else f"\\boxed{{{text}}}"
            answers.append((self._questions[row["id"]].graded(), response))
        return self._pool.grade(answers)

    def _officially(self, row: AnswerRow, rule: str, said: Mapping[Key, str]) -> Grade:
        """By the official script's rule; what a judge `said` is its extraction, as in that script."""
        question, read = self._questions[row["id"]], said.get((row["id"], row["index"]))
        mark = mark_officially(
            Answered(
                line=0,
                fields=question.facts,
                response=row["response"],
                answer=question.answer,
                choices=question.choices,
                extraction=None if read in (None, NOTHING) else read,
            ),
            rule,
        )
        reward = None if mark.correct is None else float(mark.correct)
        return Grade(reward=reward, correct=mark.correct, extracted=mark.prediction, why=mark.why)

    def _grade(
        self, rows: Sequence[AnswerRow], stop: StopFlag
    ) -> tuple[dict[str, list[Grade]], dict[str, Any] | None]:
        """Grades by every rule, which the rows are told too, and what the judge did."""
        rules, judged = {OWN_RULE: self._graded(rows)}, None
        said: Mapping[Key, str] = {}
        if self._judge is not None and self._exam.judge is not None:
            model = self._exam.judge.model
            asked = [(self._questions[row["id"]], row) for row in rows if wants_judge(row["response"])]
            said, failed = read_out(self._judge, model, asked, path=self._folder / "judged.jsonl", stop=stop)
            rules[JUDGED_RULE] = self._graded(rows, said)
            judged = {"model": model, "asked": len(asked), "read": len(said), "failed": len(failed)}
            judged["why_failed"] = list(dict.fromkeys(failed.values()))[:_SHOWN]
        if (rule := self._loaded.benchmark.official_rule) is not None:
            rules[OFFICIAL_RULE] = [self._officially(row, rule, said) for row in rows]
        for rule, grades in rules.items():
            for row, grade in zip(rows, grades, strict=True):
                verdict = {"correct": grade.correct, "extracted": grade.extracted, "why": grade.why}
                row.setdefault("rules", {})[rule] = verdict
        return rules, judged

    def _scores(
        self, rows: Sequence[AnswerRow], rules: Mapping[str, Sequence[Grade]], failed: Mapping[str, str]
    ) -> dict[str, Any]:
        benchmark, missing, asking = self._loaded.benchmark, self._loaded.missing, self._exam.asking
        refused = [row["error"] for row in rows if row["stop"] == "error"]
        answered = [self._questions[name] for name in dict.fromkeys(row["id"] for row in rows)]
        by_rule = {}
        for rule, grades in rules.items():
            verdicts = [
                Verdict(question=self._questions[row["id"]], index=row["index"], correct=grade.correct)
                for row, grade in zip(rows, grades, strict=True)
            ]
            by_rule[rule] = rule_scores(benchmark, verdicts, self._samples)
            by_rule[rule]["without_answer"] = sum(grade.extracted is None for grade in grades)
        return {
            "label": self._label,
            "benchmark": benchmark.name,
            "title": benchmark.title,
            "split": self._loaded.split,
            "source": self._loaded.source,
            "prompt": asking.style,
            "sampling": {**asking.sampling.model_dump(), "samples": self._samples},
            "n": len(answered),
            "of": self._loaded.of,
            "missing_images": {"count": len(missing), "first": [str(bad) for bad in missing[:_SHOWN]]},
            "failed": {"count": len(failed), "first": dict(list(failed.items())[:_SHOWN])},
            "refused": {"count": len(refused), "first": refused[:_SHOWN]},
            "chance": chance_level(answered),
            "mean_tokens": sum(row["tokens"] for row in rows) / max(1, len(rows)),
            "truncated": sum(row["stop"] == "length" for row in rows) / max(1, len(rows)),
            "rules": by_rule,
        }


def missing_text(loaded: Loaded) -> str:
    """Which questions are left out for want of an image."""
    total = len(loaded.questions) + len(loaded.missing)
    first = "".join(f"\n  {bad}" for bad in loaded.missing[:_SHOWN])
    more = len(loaded.missing) - _SHOWN
    return (
        f"{loaded.benchmark.title}: {len(loaded.missing):,} of {total:,} questions in {loaded.source} have "
        f"no usable image and are left out; the score is of {len(loaded.questions):,}{first}"
        + (f"\n  ... and {more:,} more" if more > 0 else "")
    )
