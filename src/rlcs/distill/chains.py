r"""Kinds of chain of thought: the requests, turn by turn, and the response composed of their answers.

A kind is a folder of Jinja2 templates: `1.j2`, `2.j2`, ... are the requests, each a single user message
that may quote the answers to earlier ones as `turns`; `response.j2` composes the response. `system.j2`
beside the folders is the system prompt. A folder named in the recipe may replace any of these files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rlcs.errors import RecipeError
from rlcs.grading.extraction import extract
from rlcs.records import IMAGE_SLOT, Problem, Request, Sample, Turn

Format = Literal["plain", "think"]
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SHORT_ANSWER = 6  # words; a text of so few only states the answer
_TAGS = re.compile(r"\s*</?think>\s*")


class Chain:
    """One kind of chain of thought: makes its requests, and composes their answers into a response."""

    def __init__(self, kind: str, *, folder: str | None, form: Format) -> None:
        """Read the templates. Raises RecipeError if one is missing or is not valid Jinja2."""
        from jinja2 import ChoiceLoader, FileSystemLoader, PackageLoader, TemplateError
        from jinja2.sandbox import SandboxedEnvironment

        if folder is not None and not Path(folder).is_dir():
            raise RecipeError("no such folder", where=f"teacher.templates={folder}", fix="correct the path")
        shipped = PackageLoader("rlcs.distill", "templates")
        loader = shipped if folder is None else ChoiceLoader([FileSystemLoader(folder), shipped])
        environment = SandboxedEnvironment(
            loader=loader, autoescape=False, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters.update(unboxed=unboxed, untagged=untagged)
        self._where = f"teacher.templates={folder}" if folder else f"templates of {kind}"
        self._form = form
        try:
            names = environment.list_templates()
            numbers = [n for n in range(1, 10) if f"{kind}/{n}.j2" in names]
            self._requests = [environment.get_template(f"{kind}/{n}.j2") for n in numbers]
            self._response = environment.get_template(f"{kind}/response.j2")
            system = environment.get_template("system.j2")
        except TemplateError as error:
            raise RecipeError(
                f"the template cannot be used: {error}", where=self._where, fix="correct it"
            ) from error
        self.system = self._render(system, {"format": form}).strip()
        """The system prompt; empty for none."""
        templates = [str(template.name) for template in (*self._requests, self._response, system)]
        self.sources = "\n".join(loader.get_source(environment, name)[0] for name in templates)
        """The text of all templates, on which the requests depend."""

    @property
    def length(self) -> int:
        """Number of requests for one response."""
        return len(self._requests)

    def request(self, problem: Problem, turns: Sequence[Sample], *, index: int = 0) -> Request:
        """Make the next request after `turns`, with the problem's images first or at their slots."""
        values = {
            "question": problem.question_with_choices,
            "turns": [turn.text for turn in turns],
            "format": self._form,
        }
        text = self._render(self._requests[len(turns)], values).strip()
        elsewhere = sum(turn.text.count(IMAGE_SLOT) for turn in problem.history)
        here = len(problem.images) - elsewhere
        # A turn quotes a slot, or the template does; without any slot all images come first.
        if text.count(IMAGE_SLOT) not in ((here,) if elsewhere else (0, here)):
            text = IMAGE_SLOT * (here if elsewhere else 0) + text.replace(IMAGE_SLOT, "")
        problem = replace(problem, question=text, choices=(), history=self._history(problem))
        return Request.of(problem, system=self.system, index=index, turn=len(turns))

    def _history(self, problem: Problem) -> tuple[Turn, ...]:
        """The turns before the question; a system turn is followed by the chain's own system prompt."""
        first, rest = problem.history[:1], problem.history[1:]
        if not (self.system and first and first[0].role == "system"):
            return problem.history
        return (replace(first[0], text=f"{first[0].text}\n\n{self.system}"), *rest)

    def response(self, turns: Sequence[Sample]) -> str:
        """Compose the turns into one response, in the format of the recipe."""
        text = self._render(self._response, {"turns": [turn.text for turn in turns]}).strip()
        return formatted(text, turns[-1].reasoning if len(turns) == 1 else "", self._form)

    def _render(self, template: Any, values: Mapping[str, object]) -> str:
        from jinja2 import TemplateError

        try:
            return str(template.render(values))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RecipeError(
                f"the template cannot be filled in: {error}", where=f"{self._where}: {template.name}"
            ) from error


def unboxed(text: str) -> str:
    r"""Replace `\boxed{5}` by `5`: only the final answer of a response stands in a box."""
    return _BOX.sub(r"\1", text)


def untagged(text: str) -> str:
    """Remove thinking tags, for the quotation of an answer."""
    return _TAGS.sub("\n\n", text).strip()


def formatted(text: str, reasoning: str, form: Format) -> str:
    r"""Format a response: `plain` without tags; `think` with the reasoning between tags before the box.

    A text without a final answer is returned unchanged; grading rejects it.
    """
    if "</think>" in text:  # the opening tag may stand in the prompt: some chat templates end with it
        before, _, text = text.rpartition("</think>")
        reasoning = _TAGS.sub("", before) or reasoning
        text = text.strip()
    if form == "plain":
        short = reasoning and len(text.split()) <= _SHORT_ANSWER  # the steps stand in the reasoning alone
        return f"{reasoning}\n\n{text}".strip() if short else text.strip()
    if reasoning:
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{text}"
    answer = extract(text).text
    return text if answer is None else f"<think>\n{unboxed(text)}\n</think>\n\n\\boxed{{{answer}}}"
