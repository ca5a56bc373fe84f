"""MathVista (arXiv 2310.02255): 1,000 testmini questions from 28 sources.

The official prompt is that of `build_query.py` in github.com/lupantech/MathVista (zero-shot, no
captions): a hint by answer type, the question with its unit, lettered choices.
"""

from rlcs.evals.benchmarks.base import Benchmark, Question, Row, facets, picture_of, text_of
from rlcs.records import lettered

_FACETS = ("language", "source", "category", "task", "context", "grade", "skills")
_FACTS = ("question_type", "answer_type", "precision", "choices", "unit")


def _hint(row: Row) -> str:
    if row["question_type"] == "multi_choice":
        return (
            "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
        )
    if row["answer_type"] == "float":
        one = int(row["precision"]) == 1
        number = "a floating-point number with " + ("one decimal place" if one else "two decimal places")
        kind, example = number, "value, e.g., " + ("1.2, 1.3, 1.4" if one else "1.23, 1.34, 1.45")
    elif row["answer_type"] == "list":
        kind, example = "a Python list as an answer", "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]"
    else:
        kind, example = "an integer answer", "value, e.g., 1, 2, 3"
    return f"Please answer the question requiring {kind} and provide the final {example}, at the end."


def read(row: Row) -> Question:
    """Read one row."""
    unit = f" (Unit: {row['unit']})" if row["unit"] else ""
    choices = tuple(str(choice) for choice in row["choices"] or ())
    listed = f"\nChoices:\n{lettered(choices)}" if choices else ""
    question = f"{text_of(row, 'question')}{unit}"
    metadata = row["metadata"]
    return Question(
        id=str(row["pid"]),
        official=f"Hint: {_hint(row)}\nQuestion: {question}{listed}",
        plain=question + listed,
        answer=str(row["answer"]),
        picture=picture_of(row, "decoded_image", "image"),
        choices=choices,
        facets=facets(
            question_type=row["question_type"],
            answer_type=row["answer_type"],
            **{name: metadata[name] for name in _FACETS},
        ),
        facts={name: row[name] for name in _FACTS},
    )


BENCHMARK = Benchmark(
    title="MathVista",
    hub_id="AI4Math/MathVista",
    splits={"testmini": 1000},
    read=read,
    official_rule="mathvista",
)
