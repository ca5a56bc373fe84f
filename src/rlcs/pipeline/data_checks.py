"""Checks the data of a run before anything is trained.

A run writes what was found into the file `data_checks.json` of its folder: rows that were left out and why,
and the overlap of training and test data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rlcs.data.check import grouped
from rlcs.data.row_cache import code_sum
from rlcs.data.rows import BadRow, Row
from rlcs.data.run_data import RunData, key_of
from rlcs.data.scan import Watch, unwatched
from rlcs.data.sources import ROLES, Role
from rlcs.data.stored import Stored, number_blind, remembered, rows_of
from rlcs.errors import DataError, PromptError
from rlcs.recipe.schema import Recipe
from rlcs.records import Problem, from_row, to_row

if TYPE_CHECKING:
    from rlcs.model.chat import Chat

CHECKS = "data_checks.json"
_CHUNK = 1000
"""Rows whose prompts are made together."""
_FAR_TOO_LONG = 16
"""A prompt of so many times the limit is not counted to its end."""


def count_prompts(
    rows: Sequence[Row], role: Role, recipe: Recipe, watch: Watch = unwatched
) -> tuple[list[BadRow], int]:
    """`long_prompts` of the prompts that a run of the recipe makes, found out once for rows that lie on disk.

    Raises ModelError.
    """

    def count() -> dict[str, Any]:
        from rlcs.model.loading import load_chat

        chat = load_chat(recipe.model, recipe.prompt, recipe.images, rl=role == "rl")
        bad, longest = long_prompts(rows, chat, recipe.prompt.max_tokens, watch)
        return {"bad": list(map(to_row, bad)), "longest": longest}

    about = _prompts_depend_on(recipe, role) if isinstance(rows, Stored) else None
    found = remembered(rows, "prompts", about, count)
    return [from_row(BadRow, row) for row in found["bad"]], found["longest"]


def _prompts_depend_on(recipe: Recipe, role: Role) -> list[Any]:
    """All but the rows that the lengths of prompts depend on."""
    from rlcs.pipeline.inputs import format_of

    return [
        format_of(recipe.model.name, recipe.model.revision),
        recipe.prompt.model_dump(mode="json"),
        recipe.images.model_dump(mode="json"),
        role == "rl",
        [version(name) for name in ("rlcs", "transformers", "tokenizers")],
        code_sum("rlcs.model", "rlcs.pipeline"),
    ]


def long_prompts(
    rows: Sequence[Row], chat: "Chat", limit: int, watch: Watch = unwatched
) -> tuple[list[BadRow], int]:
    """The rows whose prompts have more than `limit` tokens, or cannot be made, and the most tokens of any.

    Images are counted by their size alone. `watch` gets the number of rows so far, now and then.
    """
    bad: list[BadRow] = []
    longest = 0
    counting = chat.with_limit(_FAR_TOO_LONG * limit)
    for start in range(0, len(rows), _CHUNK):
        chunk = list(rows[start : start + _CHUNK])
        prompts = counting.unchecked_prompts([row.problem for row in chunk])
        for row, prompt in zip(chunk, prompts, strict=True):
            if isinstance(prompt, PromptError):
                most = _FAR_TOO_LONG * limit
                bad.append(row.refused(f"the prompt has more than {most} tokens; the limit is {limit}"))
            elif isinstance(prompt, DataError):
                bad.append(row.refused(prompt.what))
            else:
                longest = max(longest, len(prompt.ids))
                if len(prompt.ids) > limit:
                    images = sum(end - start for start, end in prompt.spans)
                    what = f"the prompt has {len(prompt.ids)} tokens, {images} of them image"
                    bad.append(row.refused(f"{what}; the limit is {limit}"))
        watch(start + len(chunk))
    return bad, longest


def too_many(
    name: str, bad: Sequence[BadRow], recipe: Recipe, *, usable: int, unread: int, longest: int
) -> DataError | None:
    """The error if rows without a prompt, and unread ones, are more than `data.max_bad_share` of a source.

    `usable` rows could be read, `unread` ones could not; `longest` is the most tokens of a prompt.
    """
    total, lost, allowed = usable + unread, len(bad) + unread, recipe.data.max_bad_share
    left = len(bad) < usable
    if not bad or (left and lost <= allowed * total):
        return None
    fixes = [
        f"set prompt.max_tokens={longest} (the longest has so many), or lower images.max_pixels"
        if longest > recipe.prompt.max_tokens
        else "correct them",
        f"or leave them out with data.max_bad_share={math.ceil(100 * lost / total) / 100:g}" if left else "",
    ]
    return DataError(
        f"{len(bad):,} of {usable:,} rows cannot become prompts (allowed: {allowed:.1%})\n    "
        + "\n    ".join(grouped(bad)),
        where=key_of(name),
        fix=", ".join(filter(None, fixes)),
    )


def check_prompts(
    data: RunData, recipe: Recipe, watch: Callable[[str, int], None] = lambda *_: None
) -> RunData:
    """Leave training rows out whose prompts are too long, and note them; measured problems count as wrong.

    `watch` gets the name of a source and the number of its rows so far, now and then.

    Raises DataError if these and the rows that could not be read are too many for `data.max_bad_share`.
    """
    rows = {
        "cold_start": data.cold_start,
        **{name: rows_of(getattr(data, name)) for name in ("rl", "test", "validation")},
    }
    notes: list[str] = []
    left_out: dict[str, set[str]] = {}
    facts: dict[str, Any] = {name: dict(each) for name, each in data.checks.get("sources", {}).items()}
    errors: list[tuple[int, DataError]] = []
    for name, each in rows.items():
        if not each:
            continue
        role: Role = next((known for known in ROLES if known == name), "test")
        bad, longest = count_prompts(each, role, recipe, partial(watch, name))
        facts[name] = {**facts.get(name, {}), "prompts_too_long": len(bad), "longest_prompt": longest}
        if bad:
            unread = facts[name].get("left_out", 0)
            if error := too_many(name, bad, recipe, usable=len(each), unread=unread, longest=longest):
                errors.append((longest, error))
            done = f"left out of {name}" if name in ("cold_start", "rl") else f"count as wrong in {name}"
            notes += [f"{done}: {line}" for line in grouped(bad)]
            left_out[name] = {row.id for row in bad}
    if errors:
        raise _joined(errors)
    left = data.without(left_out)
    notes += sight_notes(left.rl, recipe)
    return replace(left, notes=(*data.notes, *notes), checks={**data.checks, "sources": facts})


def sight_notes(problems: Sequence[Problem], recipe: Recipe) -> list[str]:
    """A warning where `grpo.sight` finds no image in some RL problems; DataError where it does in none."""
    if not recipe.grpo.sight.coefficient:
        return []
    blind = number_blind(problems)
    if not blind:
        return []
    if blind == len(problems):
        raise DataError(
            "no problem of data.rl has an image, so that nothing can be masked",
            where=f"grpo.sight.coefficient={recipe.grpo.sight.coefficient:g}",
            fix="set it to 0, or name problems with images",
        )
    share = blind / len(problems)
    return [
        f"warning: grpo.sight has no effect on {blind:,} of {len(problems):,} problems of data.rl "
        f"({share:.0%}), which have no image"
    ]


def _joined(errors: Sequence[tuple[int, DataError]]) -> DataError:
    """One error for several sources, so that all are corrected at once, by the longest prompt of any."""
    (_, first), *others = errors
    what = "\n".join([first.what, *(f"{error.where}: {error.what}" for _, error in others)])
    return DataError(what, where=first.where, fix=max(errors, key=lambda each: each[0])[1].fix)
