"""A language model that reads out final answers, where the strict rule finds no box.

MathVista's official script extracts with a language model; this does the same, with our own words,
for any benchmark. The judge never sees the gold answer and never says what is right: it only reads
out, and our own rule compares. Off unless asked for; scores with it stand under a name of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.engines.openai_client import EndpointClient, Request
from rlcs.evals.benchmarks.base import Question
from rlcs.grading.extraction import extract
from rlcs.records import Message
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, read_jsonl

NOTHING = "NONE"
"""What the judge writes for a response without an answer."""
_TASK = (
    "You read a question and a response to it. Copy out the final answer that the response gives: a "
    "number, an expression, a list, or the letter of an option. Write the answer and nothing else: no "
    "explanation, no units that the response does not give. Do not solve the question, and do not correct "
    f"the response. If it gives no final answer, write {NOTHING}."
)
_EXAMPLES = (
    ("How many cups are on the table?", "There are two red cups and one blue cup, so three in all.", "3"),
    (
        "Which angle is larger?\n(A) P\n(B) Q",
        "Angle P is about 40 degrees, Q about 75. The larger one is Q.",
        "B",
    ),
    (
        "What is the ratio of the areas?",
        "The sides are as 2 to 3, hence the areas are as 4 to 9, i.e. 4/9.",
        "4/9",
    ),
    ("How long is the ladder?", "We need the height of the wall first. The wall", NOTHING),
)
_MOST = 4000
"""Characters of a response that are shown; the end holds the answer."""

Key = tuple[str, int]


def wants_judge(response: str) -> bool:
    """Whether there is something to read out that the strict rule cannot."""
    return bool(response.strip()) and extract(response).text is None


def read_out(
    client: EndpointClient,
    model: str,
    asked: Sequence[tuple[Question, Mapping[str, Any]]],
    *,
    path: Path,
    stop: StopFlag,
) -> tuple[dict[Key, str], dict[Key, str]]:
    """What the judge reads out of the responses, by (id, index), and where it failed and why.

    `asked` are questions with rows of predictions; `path` keeps every judgement for the next time.
    """
    kept = read_jsonl(path) if path.exists() else []
    said = {_key(row): row["said"] for row in kept if row["model"] == model}
    failed: dict[Key, str] = {}
    left = {(row["id"], row["index"]): (q, row) for q, row in asked if _key(row) not in said}
    for answer in client.ask(_requests(list(left.values())), stop=stop):
        key = (answer.id, answer.index)
        if answer.finish == "error":
            failed[key] = answer.error
            continue
        facts = {"model": model, "said": answer.text.strip(), "response": left[key][1]["response"]}
        row = {"id": answer.id, "index": answer.index, **facts}
        append_jsonl(path, [row])
        said[_key(row)] = row["said"]
    return {(row["id"], row["index"]): said[_key(row)] for _, row in asked if _key(row) in said}, failed


def _key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["id"], row["index"], row["response"]


def _requests(asked: Sequence[tuple[Question, Mapping[str, Any]]]) -> Iterator[Request]:
    for question, row in asked:
        turns = [Message(role="system", parts=(_TASK,))]
        for example, response, answer in _EXAMPLES:
            turns.append(Message(role="user", parts=(_turn(example, response),)))
            turns.append(Message(role="assistant", parts=(answer,)))
        turns.append(Message(role="user", parts=(_turn(question.plain, row["response"]),)))
        yield Request(id=row["id"], index=row["index"], messages=tuple(turns), max_tokens=256)


def _turn(question: str, response: str) -> str:
    return f"Question:\n{question}\n\nResponse:\n{response[-_MOST:]}\n\nFinal answer:"
