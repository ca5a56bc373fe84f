"""Models times benchmarks: ask what is not answered yet, grade by every rule, write, compare.

`OUT/<model>/<benchmark>/` holds `predictions.jsonl` (answers as they come; at the end with every
rule's verdict), `scores.json`, and `settings.json`, which keeps answers of another setting out.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlcs.benchmarks import find
from rlcs.benchmarks.base import Question
from rlcs.benchmarks.loading import Loaded, load_benchmark
from rlcs.engines.endpoint import EndpointClient
from rlcs.errors import RunFolderError, UserError
from rlcs.examine.asking import AnswerRow, Asking, EndpointRespondent, LocalRespondent, Respondent
from rlcs.examine.comparison import write_comparison
from rlcs.examine.judge import NOTHING, read_out, wants_judge
from rlcs.examine.scores import Verdict, chance_level, rule_scores
from rlcs.files import append_jsonl, atomic_write, read_json, read_jsonl, write_json
from rlcs.grading import GradePool
from rlcs.interrupts import StopFlag
from rlcs.metrics import Screen, screen
from rlcs.recipe.schema import Endpoint
from rlcs.records import Grade

OWN_RULE = "rlcs"
JUDGED_RULE = "rlcs+judge"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What is asked of every model, and where it goes.

    `endpoint` and `judge` are servers; the model name in `endpoint` is replaced by each model's own.
    """

    benchmarks: tuple[str, ...]
    out: Path
    asking: Asking
    data: Path | None = None
    split: str | None = None
    limit: int | None = None
    endpoint: Endpoint | None = None
    judge: Endpoint | None = None
    decode_limit: int = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What grading one model's answers needs."""

    pool: GradePool
    stop: StopFlag
    judge: EndpointClient | None
    judge_model: str
    json: bool


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
    with GradePool() as pool, _client(exam.judge) as judge:
        judge_model = exam.judge.model if exam.judge else ""
        desk = Desk(pool=pool, stop=stop, judge=judge, judge_model=judge_model, json=json)
        for label, model in named.items():
            stop.check(str(exam.out))
            with _respondent(exam, model) as respondent:
                for each in loaded:
                    _examine(exam, label, each, respondent, desk)
    return write_comparison(exam.out, first=list(named))


def label_models(models: Sequence[str]) -> dict[str, str]:
    """Folder name to model. Raises UserError for two models of one name."""
    named: dict[str, str] = {}
    for text in models:
        label, equals, model = text.partition("=")
        if not equals:
            label, model = (
                "-".join([p for p in re.split(r"[/\\]", text) if p not in ("", ".", "..")][-3:]),
                text,
            )
        if not re.fullmatch(r"[\w.+:@-]+", label) or label.startswith(".") or not model:
            raise UserError(f"{text!r} names no model", where="MODEL", fix="write NAME=MODEL, or a model")
        if label in named:
            raise UserError(
                f"two models are called {label!r}", where="MODEL", fix="give them names: NAME=MODEL"
            )
        named[label] = model
    return named


@contextmanager
def _client(settings: Endpoint | None) -> Iterator[EndpointClient | None]:
    if settings is None:
        yield None
    else:
        with EndpointClient(settings) as client:
            yield client


@contextmanager
def _respondent(exam: Exam, model: str) -> Iterator[Respondent]:
    if exam.endpoint is None:
        yield LocalRespondent(model, exam.asking)
    else:
        with EndpointClient(exam.endpoint.model_copy(update={"model": model})) as client:
            yield EndpointRespondent(client, exam.asking)


def _settings(exam: Exam, loaded: Loaded, model: str) -> dict[str, Any]:
    """What decides an answer: answers of other settings never share a folder."""
    sampling = exam.asking.sampling
    return {
        "model": model,
        "weights": _weights_stamp(model) if exam.endpoint is None else None,
        "base_url": exam.endpoint.base_url if exam.endpoint else None,
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
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16] if facts else None


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into a new folder, or check that an old one has the same.

    Raises RunFolderError for answers given under other settings.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    old = read_json(path)
    changed = [
        f"{key} was {old.get(key)!r}, is {new!r}" for key, new in settings.items() if old.get(key) != new
    ]
    if changed:
        raise RunFolderError(
            f"the folder holds answers given under other settings: {'; '.join(changed)}",
            where=str(folder),
            fix="choose another --out, or another name (NAME=MODEL), or remove the folder",
        )


def _examine(exam: Exam, label: str, loaded: Loaded, respondent: Respondent, desk: Desk) -> None:
    folder = exam.out / label / loaded.benchmark.name
    path = folder / "predictions.jsonl"
    kept = read_jsonl(path) if path.exists() else []
    questions = {question.id: question for question, _ in loaded.questions}
    title = f"{label}: {loaded.benchmark.title}"
    with screen(title, len(questions) * exam.asking.samples, json=desk.json) as view:
        if loaded.missing:
            view.say(missing_text(loaded))
        rows, failed = _ask(exam, loaded, respondent, desk, kept=kept, path=path, view=view)
        desk.stop.check(str(folder))
        current = [r for r in rows if r["id"] in questions and r["index"] < exam.asking.samples]
        rules, judged = _grade(questions, current, desk, folder)
        desk.stop.check(str(folder))
        for rule, grades in rules.items():
            for row, grade in zip(current, grades, strict=True):
                verdict = {"correct": grade.correct, "extracted": grade.extracted, "why": grade.why}
                row.setdefault("rules", {})[rule] = verdict
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        scores = _scores(exam, loaded, current, rules, failed)
        write_json(folder / "scores.json", {"label": label, **scores, "judge": judged})
        for why in list(dict.fromkeys(failed.values()))[:_SHOWN]:
            view.say(f"  not answered: {why}")


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


def _ask(
    exam: Exam,
    loaded: Loaded,
    respondent: Respondent,
    desk: Desk,
    *,
    kept: list[AnswerRow],
    path: Path,
    view: Screen,
) -> tuple[list[AnswerRow], dict[str, str]]:
    """All rows, old and new, and for (question, sample) that could not be answered why."""
    answered = {(row["id"], row["index"]) for row in kept}
    wanted: list[tuple[Any, tuple[int, ...]]] = []
    for question, images in loaded.questions:
        left = tuple(i for i in range(exam.asking.samples) if (question.id, i) not in answered)
        if left:
            wanted.append((question.asked(exam.asking.style, images), left))
    graded = {question.id: question.graded() for question, _ in loaded.questions}
    total = len(graded) * exam.asking.samples
    done = total - sum(len(left) for _, left in wanted)
    rows, failed, right, seen = list(kept), dict[str, str](), 0, 0
    for new in respondent.answers(wanted, stop=desk.stop):
        good = [row for row in new if row["stop"] != "failed"]
        failed |= {f"{r['id']} #{r['index']}": r["error"] for r in new if r["stop"] == "failed"}
        append_jsonl(path, good)
        rows += good
        grades = desk.pool.grade([(graded[row["id"]], row["response"]) for row in good])
        right, seen = right + sum(g.correct is True for g in grades), seen + len(good)
        view.advance(done + seen + len(failed), accuracy=right / max(1, seen))
    return rows, failed


def _grade(
    questions: Mapping[str, Question], rows: Sequence[AnswerRow], desk: Desk, folder: Path
) -> tuple[dict[str, list[Grade]], dict[str, Any] | None]:
    """Grades of every row by every rule, and what the judge did."""
    problems = [questions[row["id"]].graded() for row in rows]
    responses = [str(row["response"]) for row in rows]
    rules = {OWN_RULE: desk.pool.grade(list(zip(problems, responses, strict=True)))}
    if desk.judge is None:
        return rules, None
    asked = [(questions[row["id"]], row) for row in rows if wants_judge(row["response"])]
    path = folder / "judged.jsonl"
    said, failed = read_out(desk.judge, desk.judge_model, asked, path=path, stop=desk.stop)
    read = []
    for row, response in zip(rows, responses, strict=True):
        text = said.get((row["id"], row["index"]), NOTHING)
        read.append(response if text == NOTHING else f"\\boxed{{{text}}}")
    rules[JUDGED_RULE] = desk.pool.grade(list(zip(problems, read, strict=True)))
    facts = {"model": desk.judge_model, "asked": len(asked), "read": len(said), "failed": len(failed)}
    return rules, {**facts, "why_failed": list(dict.fromkeys(failed.values()))[:_SHOWN]}


def _scores(
    exam: Exam,
    loaded: Loaded,
    rows: Sequence[AnswerRow],
    rules: Mapping[str, Sequence[Grade]],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    questions = {question.id: question for question, _ in loaded.questions}
    benchmark, samples = loaded.benchmark, exam.asking.samples
    refused = [row for row in rows if row["stop"] == "error"]
    by_rule = {}
    for rule, grades in rules.items():
        verdicts = [
            Verdict(question=questions[row["id"]], index=row["index"], correct=grade.correct)
            for row, grade in zip(rows, grades, strict=True)
        ]
        by_rule[rule] = rule_scores(benchmark, verdicts, samples)
        by_rule[rule]["without_answer"] = sum(grade.extracted is None for grade in grades)
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "split": loaded.split,
        "source": loaded.source,
        "prompt": exam.asking.style,
        "sampling": {**asdict(exam.asking)["sampling"].model_dump(), "samples": samples},
        "n": len({row["id"] for row in rows}),
        "of": loaded.of,
        "missing_images": {
            "count": len(loaded.missing),
            "first": [str(bad) for bad in loaded.missing[:_SHOWN]],
        },
        "failed": {"count": len(failed), "first": dict(list(failed.items())[:_SHOWN])},
        "refused": {"count": len(refused), "first": [row["error"] for row in refused[:_SHOWN]]},
        "chance": chance_level([questions[name] for name in dict.fromkeys(row["id"] for row in rows)]),
        "mean_tokens": sum(row["tokens"] for row in rows) / max(1, len(rows)),
        "truncated": sum(row["stop"] == "length" for row in rows) / max(1, len(rows)),
        "rules": by_rule,
    }
