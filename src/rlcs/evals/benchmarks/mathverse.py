"""MathVerse (arXiv 2403.14624): 788 problems, each in five versions that move text into the picture.

The official prompt is the published `query_cot`. The official script grades with a language model twice
(extraction, then comparison): see `evals.mathverse_judge`; without a judge the rlcs rule alone grades. In the
version Vision Only the question is part of the picture and has no text.
"""

import re

from rlcs.evals.benchmarks.base import Benchmark, Question, Row, facets, picture_of, text_of

_CHOICE = re.compile(r"^\(?([A-H])(?:\)|[:.\uff1a])\s*(.*?)\s*$", re.MULTILINE)
_IN_THE_PICTURE = "Please answer the question that is shown in the image."


def options_of(text: str) -> tuple[str, ...]:
    """Read the choices at the end of a question (`Choices:`, then `A:40` lines); empty if there are none."""
    _, heading, listed = text.rpartition("Choices:")
    options = _CHOICE.findall(listed) if heading else []
    in_order = [letter for letter, _ in options] == list("ABCDEFGH"[: len(options)])
    return tuple(value for _, value in options) if in_order else ()


def read(row: Row) -> Question:
    """Read one row."""
    several = row["question_type"] == "multi-choice"
    options = options_of(text_of(row, "question_for_eval")) if several else ()
    metadata = row["metadata"]
    subject = metadata["subject"]
    return Question(
        id=str(row["sample_index"]),
        official=text_of(row, "query_cot"),
        plain=text_of(row, "question").strip() or _IN_THE_PICTURE,
        answer=str(row["answer"]),
        picture=picture_of(row, "image"),
        choices=options,
        num_unlisted=4 if several else 0,
        facets=facets(
            problem_version=row["problem_version"],
            question_type=row["question_type"],
            subject=subject,
            subfield=f"{subject}, {metadata['subfield']}",
        ),
        group=str(row["problem_index"]),
        facts={"question_for_eval": text_of(row, "question_for_eval")},
    )


BENCHMARK = Benchmark(
    title="MathVerse",
    hub_id="AI4Math/MathVerse",
    config="testmini",
    splits={"testmini": 3940},
    read=read,
    official_rule="mathverse",
)
