"""Evaluates models on benchmarks: samples missing answers, grades by every rule, writes and compares scores.

With `Eval.blind` each model also answers blind, into the subfolder `blind/` of the same form.

`OUT/<model>/<benchmark>/` holds `predictions.jsonl` (answers in the order of arrival; at the end with the
grade by every rule), `scores.json`, and `settings.json` (the folder takes no answers of other settings).
"""

import hashlib
import json as jsonlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcs.data.blind import Blinding, blind_twins
from rlcs.data.images import DECODE_LIMIT
from rlcs.errors import UserError
from rlcs.evals.answer_extractor import (
    NOTHING,
    SAMPLING,
    extract_answers,
    needs_extractor,
    require_reply,
)
from rlcs.evals.answer_file import MATHVERSE, OFFICIAL_RULES, AnswerRow, grade_officially
from rlcs.evals.benchmarks import find
from rlcs.evals.benchmarks.base import Style
from rlcs.evals.benchmarks.loading import Loaded, load_benchmark
from rlcs.evals.comparison import write_comparison
from rlcs.evals.mathverse_judge import judge_rows
from rlcs.evals.scores import Verdict, answer_lengths, chance_level, rule_scores
from rlcs.generation import CachedSampler, SampleLog, Sampler, annotate, check_settings, open_sampler
from rlcs.grading import GradePool
from rlcs.model.source import find_source
from rlcs.progress import Screen, screen
from rlcs.recipe.sampling import Endpoint, EngineSettings
from rlcs.recipe.schema import Eval, Prompts
from rlcs.records import Grade, Problem, Request, Sample, SampleKey, to_row
from rlcs.signals import StopFlag
from rlcs.storage import write_json

OWN_RULE = "rlcs"
EXTRACTOR_RULE = "rlcs+judge"
OFFICIAL_RULE = "official"
PREDICTIONS = "predictions.jsonl"
BLIND = "blind"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """The settings of one evaluation: benchmarks, prompt style, samples of each question, output folder.

    `endpoint` is a server, whose model name is replaced by that of each evaluated model; without it the
    models are loaded by the engine of `engine`. `judge` (the answer extractor, and MathVerse's judge) is the
    model of a server, or one to load.
    """

    benchmarks: tuple[str, ...]
    out: Path
    sampling: Eval
    style: Style = "paper"
    samples: int = 1
    seed: int = 0
    data: Path | None = None
    split: str | None = None
    limit: int | None = None
    endpoint: Endpoint | None = None
    judge: Endpoint | str | None = None
    engine: EngineSettings = field(default_factory=EngineSettings)
    decode_limit: int = DECODE_LIMIT

    @property
    def judge_model(self) -> str:
        """The name of the judge's model."""
        return self.judge.model if isinstance(self.judge, Endpoint) else str(self.judge)

    def open_sampler(self, model: str) -> AbstractContextManager[Sampler]:
        """Load or connect to a model; a local one leaves memory when the context ends."""
        server = self.endpoint
        return open_sampler(
            model if server is None else server.model_copy(update={"model": model}),
            self.sampling.sampling(n=self.samples, seed=self.seed),
            settings=self.engine,
            rows=self.sampling.max_rows,
            logs=self.out / "rollout",
        )


def evaluate_models(
    run: EvalRun, models: Sequence[str], *, stop: StopFlag, json: bool = False
) -> dict[str, Any]:
    """Evaluate every model on every benchmark; return the comparison, which is also in OUT/comparison.json.

    A model is `NAME=MODEL` or just MODEL. Raises UserError, before any answer is sampled, if two models have
    one name or a benchmark cannot be read; DataError if one has no other image to show.
    """
    named = label_models(models)
    loaded = [
        load_benchmark(
            find(name), split=run.split, data=run.data, limit=run.limit, decode_limit=run.decode_limit
        )
        for name in dict.fromkeys(run.benchmarks)
    ]
    ways: tuple[Blinding | None, ...] = (None,)
    if run.sampling.blind != "none":
        ways = (None, run.sampling.blind)
    work = [(each, blind) for each in loaded for blind in ways if _problems(run, each, blind)]
    for label, model in named.items():
        for each, blind in work:
            path = _folder(run, label, each, blind) / PREDICTIONS
            check_settings(path, _settings(run, each, model, blind))
    extractor = nullcontext() if run.judge is None else open_sampler(run.judge, SAMPLING)
    with GradePool() as pool, extractor as judge:
        if judge is not None:
            require_reply(judge, run.judge_model)
        for label, model in named.items():
            stop.check(str(run.out))
            with run.open_sampler(model) as sampler:
                for each, blind in work:
                    one = _ModelOnBenchmark(run, label, each, pool=pool, judge=judge, blind=blind)
                    one.evaluate(sampler, stop, json=json)
    return write_comparison(run.out, first=list(named))


def label_models(models: Sequence[str]) -> dict[str, str]:
    """Map folder names to models. Raises UserError for two models of one name."""
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


def _problems(run: EvalRun, loaded: Loaded, blind: Blinding | None) -> Sequence[Problem]:
    """What the model is asked. Raises DataError where there is no other image to show."""
    problems = [question.problem(run.style, images) for question, images in loaded.questions]
    return problems if blind is None else blind_twins(problems, blind)


def _folder(run: EvalRun, label: str, loaded: Loaded, blind: Blinding | None) -> Path:
    folder = run.out / label / loaded.benchmark.name
    return folder if blind is None else folder / BLIND


def _settings(run: EvalRun, loaded: Loaded, model: str, blind: Blinding | None) -> dict[str, Any]:
    """All settings that an answer depends on: answers of different settings never share a folder."""
    # Which other image a question gets depends on all questions.
    return {
        **({} if blind is None else {"blind": blind, "limit": run.limit}),
        "model": model,
        "weights": _weights_stamp(model) if run.endpoint is None else None,
        "base_url": run.endpoint.base_url if run.endpoint else None,
        "request": run.endpoint.request.model_dump(mode="json", include={"omit", "extra"})
        if run.endpoint
        else None,
        "engine": None if run.endpoint or run.engine.engine == "local" else "vllm",
        "split": loaded.split,
        "prompt": run.style,
        **run.sampling.model_dump(include={"temperature", "top_p", "max_new_tokens"}),
        "seed": run.seed,
    }


def _weights_stamp(model: str) -> str | None:
    """Hash of names, sizes and times of the weight files in a local folder. None for a hub id."""
    folder = find_source(model).files
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(jsonlib.dumps(facts).encode()).hexdigest()[:16] if facts else None


class _ModelOnBenchmark:
    """The evaluation of one model on one benchmark, `blind` or with its images."""

    def __init__(
        self,
        run: EvalRun,
        label: str,
        loaded: Loaded,
        *,
        pool: GradePool,
        judge: Sampler | None,
        blind: Blinding | None,
    ) -> None:
        self._run, self._label, self._loaded = run, label, loaded
        self._pool, self._judge, self._blind = pool, judge, blind
        self._problems = _problems(run, loaded, blind)
        ids = {problem.id for problem in self._problems}
        self._questions = {question.id: question for question, _ in loaded.questions if question.id in ids}
        self._folder = _folder(run, label, loaded, blind)

    def evaluate(self, sampler: Sampler, stop: StopFlag, *, json: bool) -> None:
        """Sample, grade and write. Raises Stopped, with all finished answers on disk."""
        title = f"{self._label}: {self._loaded.benchmark.title}{', blind' if self._blind else ''}"
        with screen(title, len(self._questions) * self._run.samples, json=json) as view:
            if self._loaded.missing:
                view.say(missing_text(self._loaded))
            samples, failed = self._sample(sampler, view, stop)
            stop.check(str(self._folder))
            rules, judged = self._grade(samples, stop)
            stop.check(str(self._folder))
            verdicts = {
                sample.key: {"rules": {rule: to_row(grades[index]) for rule, grades in rules.items()}}
                for index, sample in enumerate(samples)
            }
            annotate(self._folder / PREDICTIONS, verdicts)
            scores = {**self._scores(samples, rules, failed), "judge": judged}
            write_json(self._folder / "scores.json", scores)
            for why in list(dict.fromkeys(failed.values()))[:_SHOWN]:
                view.say(f"  not answered: {why}")

    def _sample(self, sampler: Sampler, view: Screen, stop: StopFlag) -> tuple[list[Sample], dict[str, str]]:
        """Return all samples, old and new, and the errors of those that failed.

        A request that fails on a server is repeated by the next call. A local model that cannot answer (its
        prompt is too long) never will: that sample is kept and counts as wrong.
        """
        run = self._run
        system = Prompts().system if run.style == "paper" else None  # the official scripts send none
        requests = [
            Request.of(problem, system=system, index=index)
            for problem in self._problems
            for index in range(run.samples)
        ]
        failed: dict[str, str] = {}
        digests = {problem.id: problem.digest for problem in self._problems}
        with SampleLog(self._folder / PREDICTIONS, digests) as log:
            left = list(log.unanswered(requests))
            if left:  # the first answer may be minutes away
                view.say(f"{self._label}: asking {len(left):,} of {len(requests):,}")
            right = 0
            for count, sample in enumerate(sampler.samples(left, stop=stop), start=1):
                if sample.retryable or (sample.error and run.endpoint):
                    failed[f"{sample.id} #{sample.index}"] = sample.error
                else:
                    log.add(sample)
                    right += self._own_grades([sample])[0].correct is True
                accuracy = right / max(1, count - len(failed))
                view.advance(len(requests) - len(left) + count, accuracy=accuracy)
            samples = [entry.sample for entry in log.entries.values()]
        return [sample for sample in samples if sample.index < run.samples], failed

    def _grade(
        self, samples: Sequence[Sample], stop: StopFlag
    ) -> tuple[dict[str, list[Grade]], dict[str, Any] | None]:
        """Grade by every rule; also return the counts of the answer extractor, None without one."""
        rules, judged = {OWN_RULE: self._own_grades(samples)}, None
        extracted: Mapping[SampleKey, str] = {}
        rule, path = self._loaded.benchmark.official_rule, self._folder / "judged.jsonl"
        if self._judge is not None:
            model = self._run.judge_model
            unread = [(self._questions[each.id], each) for each in samples if needs_extractor(each.text)]
            extracted, failed = extract_answers(self._judge, model, unread, path=path, stop=stop)
            rules[EXTRACTOR_RULE] = self._own_grades(samples, extracted)
            judged = {"model": model, "asked": len(unread), "read": len(extracted), "failed": len(failed)}
            judged["why_failed"] = list(dict.fromkeys(failed.values()))[:_SHOWN]
            if rule == MATHVERSE:
                with CachedSampler(self._judge, model, path) as cached:
                    rules[OFFICIAL_RULE] = judge_rows(
                        [self._row(each, {}) for each in samples], cached, stop=stop
                    )
        if rule is not None and rule in OFFICIAL_RULES:
            rules[OFFICIAL_RULE] = [grade_officially(self._row(each, extracted), rule) for each in samples]
        return rules, judged

    def _own_grades(
        self, samples: Sequence[Sample], extracted: Mapping[SampleKey, str] | None = None
    ) -> list[Grade]:
        """Grade by the rlcs rule; an `extracted` answer is graded in place of its response."""
        answers = []
        for sample in samples:
            text = (extracted or {}).get(sample.key, NOTHING)
            response = sample.text if text == NOTHING else f"\\boxed{{{text}}}"
            answers.append((self._questions[sample.id].graded(), response))
        return self._pool.grade(answers)

    def _row(self, sample: Sample, extracted: Mapping[SampleKey, str]) -> AnswerRow:
        """A sample as an official script reads it: its `extracted` answer takes the response's place."""
        question, text = self._questions[sample.id], extracted.get(sample.key, NOTHING)
        return AnswerRow(
            line=0,
            fields={"question": question.plain, **question.facts},
            response=sample.text,
            answer=question.answer,
            choices=question.choices,
            extraction=None if text == NOTHING else text,
        )

    def _scores(
        self, samples: Sequence[Sample], rules: Mapping[str, Sequence[Grade]], failed: Mapping[str, str]
    ) -> dict[str, Any]:
        benchmark, missing, run = self._loaded.benchmark, self._loaded.missing, self._run
        refused = [sample.error for sample in samples if sample.error]
        answered = [self._questions[name] for name in dict.fromkeys(sample.id for sample in samples)]
        by_rule = {}
        for rule, grades in rules.items():
            verdicts = [
                Verdict(question=self._questions[sample.id], index=sample.index, correct=grade.correct)
                for sample, grade in zip(samples, grades, strict=True)
            ]
            by_rule[rule] = rule_scores(benchmark, verdicts, run.samples)
            by_rule[rule]["without_answer"] = sum(grade.extracted is None for grade in grades)
        return {
            "label": self._label,
            "benchmark": benchmark.name,
            "title": benchmark.title,
            "split": self._loaded.split,
            "source": self._loaded.source,
            "prompt": run.style,
            "blind": self._blind or "none",
            "sampling": {**run.sampling.model_dump(), "samples": run.samples},
            "n": len(answered),
            "of": self._loaded.of,
            "missing_images": {"count": len(missing), "first": [str(bad) for bad in missing[:_SHOWN]]},
            "failed": {"count": len(failed), "first": dict(list(failed.items())[:_SHOWN])},
            "refused": {"count": len(refused), "first": refused[:_SHOWN]},
            "chance": chance_level(answered),
            **answer_lengths(samples),
            "rules": by_rule,
        }


def missing_text(loaded: Loaded) -> str:
    """A message about the questions that are left out because their image is missing."""
    total = len(loaded.questions) + len(loaded.missing)
    first = "".join(f"\n  {bad}" for bad in loaded.missing[:_SHOWN])
    more = len(loaded.missing) - _SHOWN
    return (
        f"{loaded.benchmark.title}: {len(loaded.missing):,} of {total:,} questions in {loaded.source} have "
        f"no usable image and are left out; the score is of {len(loaded.questions):,}{first}"
        + (f"\n  ... and {more:,} more" if more > 0 else "")
    )
