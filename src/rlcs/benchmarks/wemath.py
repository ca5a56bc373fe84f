"""We-Math (arXiv 2407.01284): 525 problems of two or three steps, and each step as a question alone.

Official words as used with github.com/We-Math/We-Math, without the knowledge concept. The paper that
this library follows reports plain accuracy over the 1,740 questions; `four_dimensions` are the
benchmark's own scores, and the two must never be mixed up.
"""

import re
from collections import Counter, defaultdict

from rlcs.benchmarks.base import Benchmark, Question, Row, Verdicts, facets, picture_of, text_of

_ASK = (
    "Now, we require you to solve a multiple-choice math question. Please briefly describe your thought "
    "process and provide the final answer(option)."
)
_FORMAT = (
    "Regarding the format, please answer following the template below, and be sure to include two <> "
    "symbols:\n<Thought process>: <<your thought process>> <Answer>: <<your option>>"
)


def options_of(text: str) -> tuple[str, ...]:
    """`A. 1; B. 2; ...` in pieces, letters in order; a wrong last letter (`F. No correct answer`) passes.

    Separators are irregular in the published file; a letter inside an option (`shape C.`) is none.
    """
    starts: list[re.Match[str]] = []
    for letter in "ABCDEFGH":
        at = starts[-1].end() if starts else 0
        strict = re.compile(rf"(?:^|;)\s*{letter}\s*[.\uff0e]\s*(?=[^;\s])")
        loose = re.compile(rf"(?<![A-Za-z]){letter}\s*[.\uff0e]\s*(?=[^;\s])")
        match = strict.search(text, at) or loose.search(text, at)
        if match is None:
            break
        starts.append(match)
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return tuple(text[m.end() : end].strip(" ;") for m, end in zip(starts, ends, strict=False))


def read(row: Row) -> Question:
    """One row; `ID` is its problem, `key` its step (`2steps_1`, ..., `3steps_multi`)."""
    question, option = text_of(row, "question"), text_of(row, "option")
    options = options_of(option)
    return Question(
        id=f"{row['ID']}/{row['key']}",
        official=f"{_ASK}\nQuestion: {question}\nOption: {option}\n{_FORMAT}",
        plain=f"{question}\n{option}",
        answer=str(row["answer"]),
        picture=picture_of(row, "image_path"),
        choices=options,
        num_options=len(options),
        facets=facets(step=row["key"]),
        group=str(row["ID"]),
        facts={"key": row["key"]},
    )


def four_dimensions(verdicts: Verdicts) -> dict[str, float | None]:
    """Strict and loose score, and the rates of the four kinds, over the problems that are complete.

    With `steps` the verdicts of the one-step questions and `whole` that of the composed one: wrong
    whole: IG (inadequate generalisation) if all steps are right, else IK (insufficient knowledge);
    right whole: CM (complete mastery) if all steps are right (strict) or any is (loose), else RM (rote
    memorisation). Score = (CM + IG / 2) / problems; the RM rate is RM / (CM + RM), as published.
    """
    problems: dict[str, dict[str, bool]] = defaultdict(dict)
    for question, correct in verdicts:
        problems[question.group][str(question.facts["key"])] = correct
    complete = [keys for keys in problems.values() if _is_complete(keys)]
    kinds: dict[str, Counter[str]] = {"strict": Counter(), "loose": Counter()}
    for keys in complete:
        whole = next(right for key, right in keys.items() if key.endswith("multi"))
        steps = [right for key, right in keys.items() if not key.endswith("multi")]
        for name, mastered in (("strict", all(steps)), ("loose", any(steps))):
            wrong = "IG" if all(steps) else "IK"
            kinds[name][("CM" if mastered else "RM") if whole else wrong] += 1
    total = len(complete)
    scores: dict[str, float | None] = {"problems": float(total)}
    for name, count in kinds.items():
        known = count["CM"] + count["RM"]
        scores[f"{name}_score"] = (count["CM"] + 0.5 * count["IG"]) / total if total else None
        for kind in ("IK", "IG", "CM"):
            scores[f"{name}_{kind}"] = count[kind] / total if total else None
        scores[f"{name}_RM"] = count["RM"] / known if known else None
    return scores


def _is_complete(keys: dict[str, bool]) -> bool:
    """Whether all steps and the composed question of a problem are there."""
    steps = int(next(iter(keys))[0])
    return set(keys) == {f"{steps}steps_{part}" for part in (*range(1, steps + 1), "multi")}


BENCHMARK = Benchmark(
    name="wemath",
    title="We-Math",
    hub_id="We-Math/We-Math",
    splits={"testmini": 1740},
    read=read,
    official_rule="wemath",
    metrics=four_dimensions,
)
