"""What a model's own chat template does with texts and answers, found by what it renders.

Templates of models that think (Qwen3.5) open a `<think>` block where an answer begins, or write an empty one
if `enable_thinking` is false; they leave the reasoning out of earlier answers, and strip texts.
"""

from dataclasses import dataclass
from typing import Any

from rlcs.errors import RecipeError
from rlcs.model.chat_format import ChatFormat

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateRules:
    """`answer_start` stands behind the assistant's role, where an answer begins.

    `strips`: white space around what a turn says is left out. `drops_thinking`: so is what earlier answers
    say up to `</think>`.
    """

    answer_start: str = ""
    strips: bool = False
    drops_thinking: bool = False

    def response(self, text: str) -> str:
        """What is left to say of a response to imitate, behind `answer_start`.

        A block that is open is not opened again; a response that does not think closes it at once.
        """
        if not self.answer_start.rstrip().endswith(OPEN):
            return text
        if CLOSE not in text:
            return f"\n{CLOSE}\n\n{text}"
        return text.removeprefix(self.answer_start).removeprefix(OPEN)


def rules_of(processor: Any, written: ChatFormat, *, thinking: bool | None) -> TemplateRules:
    """Find the rules of a processor's chat template. Raises RecipeError for `thinking` that it does not know.

    `thinking` is what the template calls `enable_thinking`; None: what it does by default.
    """
    if not processor.chat_template:
        return TemplateRules()
    if thinking is not None:
        (before, on), (same, off) = (_begun(processor, written, switch) for switch in (True, False))
        if before != same or on == off:
            raise RecipeError(
                "the model's chat template has no such switch where an answer begins",
                where=f"prompt.thinking={str(thinking).lower()}",
                fix="leave prompt.thinking out for this model",
            )
    assistant = written.turn_start + written.roles["assistant"]
    earlier = _rendered(processor, " u ", f"{OPEN}\nr\n{CLOSE}\n\na", "u")
    return TemplateRules(
        answer_start=answer_start(processor, written, thinking),
        strips=f"{written.roles['user']}u{written.turn_end}" in earlier.partition(assistant)[0],
        drops_thinking=OPEN not in earlier,
    )


def answer_start(processor: Any, written: ChatFormat, thinking: bool | None = None) -> str:
    """What the template writes behind the assistant's role where an answer begins."""
    return _begun(processor, written, thinking)[1]


def _begun(processor: Any, written: ChatFormat, thinking: bool | None) -> tuple[str, str]:
    """A prompt up to the assistant's role, and what stands behind it."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    text = _rendered(processor, "u", add_generation_prompt=True, **options)
    before, found, start = text.rpartition(written.turn_start + written.roles["assistant"])
    return (before, start) if found else (text, "")


def set_default_thinking(processor: Any, thinking: bool, written: ChatFormat) -> None:
    """Make the processor's chat template think, or not, when it is not told; saved with the processor."""
    if answer_start(processor, written) == answer_start(processor, written, thinking):
        return
    literal = str(thinking).lower()
    head = (
        f"{{%- if enable_thinking is not defined -%}}{{%- set enable_thinking = {literal} -%}}{{%- endif -%}}"
    )
    processor.chat_template = processor.tokenizer.chat_template = f"{head}\n{processor.chat_template}"


def _rendered(processor: Any, *turns: str, **options: Any) -> str:
    """A conversation that begins with a user's turn."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(turns)
    ]
    return str(processor.apply_chat_template(messages, tokenize=False, **options))
