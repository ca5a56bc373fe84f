"""Extraction of final answers by a language model, where the strict rule finds no box.

MathVista's official script extracts with a language model; this does the same for any benchmark, with a
prompt written here. The extractor never sees the gold answer and does not grade: it copies the final answer
out of a response, and the rlcs rule compares it. Off unless `--judge-model` is given; its scores are reported
apart, as the rule `rlcs+judge`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rlcs.errors import EndpointError
from rlcs.evals.benchmarks.base import Question
from rlcs.generation import CachedSampler, Sampler
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
    prompts = [_messages(question, sample.text) for question, sample in answered]
    with CachedSampler(sampler, model, path) as cached:
        replies = cached.samples(prompts, stop=stop)
    pairs = [(sample, reply) for (_, sample), reply in zip(answered, replies, strict=True)]
    failed = {f"{sample.id} #{sample.index}": reply.error for sample, reply in pairs if reply.error}
    return {sample.key: reply.text.strip() for sample, reply in pairs if not reply.error}, failed


def require_reply(sampler: Sampler, model: str) -> None:
    """Make one request, so that a model that does not reply is found before hours of sampling."""
    request = Request(id="trial", messages=few_shot(_TASK, (), _prompt("What is 2 + 3?", "It is 5.")))
    for sample in sampler.samples([request]):
        if sample.error:
            raise EndpointError(
                f"{model} does not reply to a trial request: {sample.error}",
                where="--judge-model",
                fix="see that its server works, or name another model",
            )


def few_shot(task: str, examples: Iterable[tuple[str, str]], prompt: str) -> tuple[Message, ...]:
    """A conversation that sets a task, shows examples (prompt, reply), and ends with the prompt to answer."""
    messages = [Message(role="system", parts=(task,))]
    for question, reply in examples:
        messages.append(Message(role="user", parts=(question,)))
        messages.append(Message(role="assistant", parts=(reply,)))
    return (*messages, Message(role="user", parts=(prompt,)))


def _messages(question: Question, response: str) -> tuple[Message, ...]:
    examples = [(_prompt(example, text), answer) for example, text, answer in _EXAMPLES]
    return few_shot(_TASK, examples, _prompt(question.plain, response))


def _prompt(question: str, response: str) -> str:
    return f"Question:\n{question}\n\nResponse:\n{response[-_MAX_SHOWN:]}\n\nFinal answer:"
