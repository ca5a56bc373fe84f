"""We-Math (arXiv 2407.01284): 525 problems of two or three steps, and each step as a question alone.

The official prompt is that of github.com/We-Math/We-Math, without the knowledge concept. The paper that this
library follows reports plain accuracy over the 1,740 questions; `metrics` are the benchmark's own scores,
which cannot be compared with it.
"""

import re
from collections import defaultdict

from rlcs.evals.benchmarks.base import Benchmark, Question, Row, Verdicts, facets, picture_of, text_of
from rlcs.grading.official import wemath as official

_ASK = (
    "Now, we require you to solve a multiple-choice math question. Please briefly describe your thought "
    "process and provide the final answer(option)."
)
_FORMAT = (
    "Regarding the format, please answer following the template below, and be sure to include two <> "
    "symbols:\n<Thought process>: <<your thought process>> <Answer>: <<your option>>"
)


def options_of(text: str) -> tuple[str, ...]:
    """Split `A. 1; B. 2; ...` into its options.

    Letters must come in order: `F. ...` after `D. ...` stays part of D. Separators are irregular in the
    published file; a letter inside an option (`shape C.`) starts no option.
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
    """Read one row; `ID` is its problem, `key` its step (`2steps_1`, ..., `3steps_multi`)."""
    question, option = text_of(row, "question"), text_of(row, "option")
    options = options_of(option)
    return Question(
        id=f"{row['ID']}/{row['key']}",
        official=f"{_ASK}\nQuestion: {question}\nOption: {option}\n{_FORMAT}",
        plain=f"{question}\n{option}",
        answer=str(row["answer"]),
        picture=picture_of(row, "image_path"),
        choices=options,
        facets=facets(step=row["key"]),
        group=str(row["ID"]),
        facts={"key": row["key"]},
    )


def metrics(verdicts: Verdicts) -> dict[str, float | None]:
    """Compute the benchmark's own scores over its complete problems: four dimensions and accuracy by steps.

    They are `strict_` and `loose_` score and rates of IK, IG, CM and RM (see `grading.official.wemath`), and
    S1, S2, S3: the accuracy of one-step questions, and of composed ones of two and of three steps.
    """
    items = [(question.group, str(question.facts["key"]), correct) for question, correct in verdicts]
    keys: dict[str, set[str]] = defaultdict(set)
    for group, key, _ in items:
        keys[group].add(key)
    complete = {group for group, members in keys.items() if _is_complete(members)}
    problems = list(official.group(item for item in items if item[0] in complete).values())
    scores: dict[str, float | None] = {"problems": float(len(problems))}
    for name in ("strict", "loose"):
        counts = official.four_dimensions(problems, loose=name == "loose")
        rates = {
            "score": counts.score,
            "IK": counts.ik_rate,
            "IG": counts.ig_rate,
            "CM": counts.cm_rate,
            "RM": counts.rm_rate if counts.cm + counts.rm else None,
        }
        scores |= {f"{name}_{kind}": rate if problems else None for kind, rate in rates.items()}
    steps = official.step_accuracies(problems)
    return scores | {name: share if problems else None for name, share in steps.items()}


def _is_complete(keys: set[str]) -> bool:
    """Whether `keys` has all steps and the composed question of a problem."""
    steps = int(next(iter(keys))[0])
    return keys == {f"{steps}steps_{part}" for part in (*range(1, steps + 1), "multi")}


BENCHMARK = Benchmark(
    title="We-Math",
    hub_id="We-Math/We-Math",
    splits={"testmini": 1740},
    read=read,
    official_rule="wemath",
    metrics=metrics,
)
