r"""Geometry3K as published in hiyouga/geometry3k (from InterGPS, arXiv 2105.04165): answers are values.

The official prompt is EasyR1's format prompt (`examples/format_prompt/math.jinja`), with which the data set
is mostly used.
"""

from rlcs.evals.benchmarks.base import Benchmark, Question, Row
from rlcs.records import IMAGE_SLOT

_ASK = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final "
    "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST "
    "BE put in \\boxed{}."
)


def read(row: Row) -> Question:
    """Read one row; `<image>` in its `problem` marks the place of the image."""
    problem = str(row["problem"])
    slots = problem.count(IMAGE_SLOT)
    images = row.get("images") or row.get("image")
    picture = images[0] if isinstance(images, list) and images else images
    plain = problem if slots == 1 else problem.replace(IMAGE_SLOT, "")
    return Question(
        id=str(row["id"]),
        official=f"{plain.strip()} {_ASK}",
        plain=plain,
        answer=str(row["answer"]),
        picture=picture,
    )


BENCHMARK = Benchmark(
    title="Geometry3K",
    hub_id="hiyouga/geometry3k",
    splits={"test": 601, "validation": 300},
    read=read,
)
