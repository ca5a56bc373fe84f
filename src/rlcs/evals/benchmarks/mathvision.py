r"""MATH-Vision (MATH-V, arXiv 2402.14804): 3,040 competition problems, 16 subjects, 5 levels.

Prompt and files as in github.com/mathllm/MATH-V. If all options of a question are letters, its options are
part of the picture and are not listed in the prompt.
"""

from rlcs.evals.benchmarks.base import Benchmark, Question, Row, facets, picture_of, text_of
from rlcs.records import IMAGE_SLOT, lettered

_ASK = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple '
    'choice question, only one letter is allowed in the "\\boxed{}".'
)
_TAG = "<image1>"


def read(row: Row) -> Question:
    """Read one row."""
    question = text_of(row, "question")
    options = tuple(str(option) for option in row["options"] or ())
    in_picture = options == tuple("ABCDE"[: len(options)])
    listed = "" if in_picture else "\n" + lettered(options)
    one_tag = question.count("<image") == 1 and _TAG in question
    plain = question.replace(_TAG, IMAGE_SLOT) if one_tag else question
    subject, level = str(row["subject"]), f"level {row['level']}"
    return Question(
        id=str(row["id"]),
        official=f"{_ASK}\n{question}{listed}\n",
        plain=plain + listed,
        answer=str(row["answer"]),
        picture=picture_of(row, "decoded_image", "image"),
        choices=options,
        facets=facets(subject=subject, level=level, level_and_subject=f"{level}, {subject}"),
        facts={"options": options},
    )


BENCHMARK = Benchmark(
    title="MATH-Vision",
    hub_id="MathLLMs/MathVision",
    splits={"test": 3040, "testmini": 304},
    read=read,
    official_rule="mathvision",
)
