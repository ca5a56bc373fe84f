"""Extraction of final answers by a language model, where the strict rule finds no box.

MathVista's official script extracts with a language model; this does the same for any benchmark, with a
prompt written here. The extractor never sees the gold answer and does not grade: it copies the final answer
out of a response, and the rlcs rule compares it. Off unless `--judge-url` is given; its scores are reported
apart, as the rule `rlcs+judge`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rlcs.evals.benchmarks.base import Question
from rlcs.generation import SampleLog, Sampler
from rlcs.grading.extraction import extract
from rlcs.records import Message, Request, Sample, SampleKey, Sampling
from rlcs.signals import StopFlag

SAMPLING = Sampling(max_new_tokens=256, temperature=0.0)
"""Sampling settings of the extractor: greedy, short answers."""
NOTHING = "NONE"
"""What the extractor writes for a response without an answer."""
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
_MAX_SHOWN = 4000
"""Characters from the end of a response that the extractor reads; the answer stands there."""


def needs_extractor(response: str) -> bool:
    """Whether the response has text, but no answer that the strict rule can extract."""
    return bool(response.strip()) and extract(response).text is None


def extract_answers(
    sampler: Sampler,
    model: str,
    answered: Sequence[tuple[Question, Sample]],
    *,
    path: Path,
    stop: StopFlag,
) -> tuple[dict[SampleKey, str], dict[str, str]]:
    """Extract the final answers of samples: return the answers by sample key, and the errors by request id.

    `path` is a log of what `model`, the model behind `sampler`, extracted: a later call reuses it.
    """
    requests, digests, keys = [], dict[str, str](), dict[str, SampleKey]()
    for question, sample in answered:
        request = Request(id=f"{sample.id} #{sample.index}", messages=_messages(question, sample.text))
        requests.append(request)
        keys[request.id] = sample.key
        facts = json.dumps([model, sample.text])
        digests[request.id] = hashlib.sha256(facts.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    failed = {}
    with SampleLog(path, digests, may_change=True) as log:
        for extraction in sampler.samples(log.unanswered(requests), stop=stop):
            if extraction.error:
                failed[extraction.id] = extraction.error
            else:
                log.add(extraction)
        return {keys[name]: entry.sample.text.strip() for (name, *_), entry in log.entries.items()}, failed


def _messages(question: Question, response: str) -> tuple[Message, ...]:
    messages = [Message(role="system", parts=(_TASK,))]
    for example, text, answer in _EXAMPLES:
        messages.append(Message(role="user", parts=(_prompt(example, text),)))
        messages.append(Message(role="assistant", parts=(answer,)))
    return (*messages, Message(role="user", parts=(_prompt(question.plain, response),)))


def _prompt(question: str, response: str) -> str:
    return f"Question:\n{question}\n\nResponse:\n{response[-_MAX_SHOWN:]}\n\nFinal answer:"
