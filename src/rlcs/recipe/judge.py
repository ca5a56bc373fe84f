"""The recipe's section of a judge: the model, its prompt, the scale of its scores, and its limits."""

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from rlcs.errors import DataError, RecipeError
from rlcs.recipe.sampling import Endpoint, Server
from rlcs.recipe.section import Positive, Seconds, Weight, Whole
from rlcs.storage import at_home, read_regular

PLACEHOLDERS = ("question", "answer", "response", "extracted")
"""What a template may name: question with choices, gold answer, response, final answer in its box."""
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")
KEY = "grpo.reward.judge"


class Judge(Server):
    """A part of the reward that a language model gives."""

    weight: Weight = 0.0
    """Weight of the judge's score; 0: off."""
    base_url: str | None = None
    """Address of its server, with the version: `http://localhost:8000/v1`. None: rlcs loads `model`."""
    model: str | None = None
    """The model's name on the server; without `base_url` a folder, a hub id, or `builtin`."""
    template: str | None = None
    """The prompt: a file, or the text itself, with {response} or {extracted}, and {question}, {answer}; other
    braces are written twice where they enclose one word. None: the shipped prompt for the scale."""
    scale: Literal["yes_no", "zero_to_one"] = "yes_no"
    """How a reply's last line, or its last <score> tag, is read: yes is 1 and no is 0, or a number from 0 to
    1. A reply that cannot be read is not scored."""
    max_new_tokens: Positive = 512
    """Longest reply in tokens; a longer one is not scored. The temperature is 0."""
    request_timeout_s: Seconds = 60.0
    """Seconds one attempt at one request may take in all."""
    max_retries: Whole = 2
    """Further attempts after a failure that may be temporary (busy, down, cut off, garbled)."""
    max_wait_s: Seconds = 300.0
    """Most seconds a step waits for replies after its answers are sampled; what is missing is not scored."""
    max_requests: Positive | None = None
    """Most questions to the judge in a run, to bound its cost; answers beyond are not scored. Neither the
    further attempts at a question count, nor the two questions of the trial before it. None: no limit."""

    faults: bool = False
    """After the measurement the judge says of every wrong answer which part failed, perception or reasoning,
    for the report; its weight may be 0. Of built-in problems that is known without a judge."""
    sees_images: bool = False
    """For `faults` the judge gets the images too: it must be a model that sees them. Without them it can only
    tell whether an answer follows from what it states itself."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Judge":
        if (self.weight or self.faults) and not self.model:
            raise ValueError("a judge needs model, and base_url where a server runs it")
        if self.template is not None and "{" in self.template:
            require_placeholders(self.template)
        return self

    @property
    def source(self) -> str | Endpoint:
        """The model: on a server, or one that rlcs loads."""
        if self.base_url is None:
            return str(self.model)
        return self.at(self.base_url, str(self.model), section=KEY)

    def template_text(self) -> str | None:
        """The template's text, which may stand in a file. Raises RecipeError."""
        if self.template is None or "{" in self.template:
            return self.template
        where = f"{KEY}.template"
        try:
            text = read_regular(at_home(self.template)).decode()
        except (DataError, UnicodeDecodeError) as error:
            fix = "name a text file, or write the prompt itself, with {response}"
            raise RecipeError(f"cannot read {self.template}: {error}", where=where, fix=fix) from error
        try:
            require_placeholders(text)
        except ValueError as error:
            raise RecipeError(f"{self.template}: {error}", where=where, fix="correct the file") from error
        return text


def require_placeholders(template: str) -> None:
    """Raise ValueError for a placeholder that is not known, or a template that shows no answer to judge."""
    names = {match[1] for match in _PLACEHOLDER.finditer(template) if match[1]}
    if unknown := sorted(names - set(PLACEHOLDERS)):
        listed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(
            f"the template has an unknown placeholder {{{unknown[0]}}}: known are {listed}; "
            f"write {{{{{unknown[0]}}}}} for the braces themselves"
        )
    if not names & {"response", "extracted"}:
        raise ValueError("the template shows the judge nothing to judge: add {response} or {extracted}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders replaced; what the values hold is never replaced again."""
    braces = {"{{": "{", "}}": "}"}
    return _PLACEHOLDER.sub(lambda found: braces.get(found[0]) or values[found[1]], template)
