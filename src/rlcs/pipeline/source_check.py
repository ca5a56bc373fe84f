"""What `rlcs data check` finds in a data source, and in all sources of a recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rlcs.data.files import JsonLines
from rlcs.data.given import grade_given, sentences, unanswerable, why_left_out
from rlcs.data.loading import load, open_source, require_usable
from rlcs.data.rows import BadRow, Row
from rlcs.data.run_data import RunData, by_pass_rate, compare_with_test, sources_of
from rlcs.data.scan import Watch, scan, unwatched
from rlcs.data.sources import Role, is_builtin
from rlcs.data.tally import CheckTask, Kind, PromptLimit, RowCheck, Tally
from rlcs.errors import DataError
from rlcs.pipeline.data_checks import count_prompts, too_many
from rlcs.recipe.schema import Recipe
from rlcs.records import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCheck:
    """What was found in one source: how many rows can be used, and which cannot.

    `rows` could be read and `good` ones can be used; both are empty where rows were not held: then `lines`
    are the numbers of the lines that can be used. `refusal` is why a run does not start with it, or "".
    """

    role: Role
    source: str
    usable: int
    bad: tuple[BadRow, ...]
    notes: tuple[str, ...]
    kinds: Mapping[str, Kind]
    """What the gold answers of usable rows are read as, the most frequent kind first."""
    rows: Sequence[Row] = ()
    good: tuple[Row, ...] = ()
    lines: Sequence[int] = ()
    refusal: str = ""


def check_source(
    source: str,
    role: Role,
    recipe: Recipe,
    *,
    for_run: bool,
    keep: Literal["", "lines", "rows"] = "",
    watch: Watch = unwatched,
) -> SourceCheck:
    """Read a source, decode every image, and try every gold answer, response and prompt.

    With `for_run` the recipe is the one that will run: its model, teacher and limits decide too. Rows, of
    which a million take gigabytes, are held only then, where responses are graded, and where they are to be
    kept: with `lines` their numbers are enough, if the source has a line for each. See `Watch` for `watch`.
    Raises DataError when the source as a whole cannot be used, and ModelError.
    """
    if for_run or keep == "rows" or role == "cold_start" or is_builtin(source):
        return _check_held(source, role, recipe, for_run=for_run, watch=watch)
    table, data, options = open_source(source, recipe.data, role)
    has_lines = isinstance(table.rows, JsonLines)
    if options.part is not None or (keep and not has_lines):  # which rows a part has depends on all of them
        return _check_held(source, role, recipe, for_run=for_run, watch=watch)
    scanner = scan(
        CheckTask(
            table=table,
            settings=data,
            role=role,
            decode_limit=recipe.images.decode_limit,
            prompt_limit=_prompt_limit(recipe),
        ),
        watch=watch,
    )
    bad = [*scanner.bad, *scanner.sink.settle()]
    tally = scanner.sink.tally
    return SourceCheck(
        role=role,
        source=source,
        usable=tally.rows,
        bad=_once(bad),
        notes=(*scanner.notes, *tally.notes, *_length_notes(tally, recipe)),
        kinds=tally.kinds,
        lines=tally.places if has_lines else (),
    )


def _check_held(source: str, role: Role, recipe: Recipe, *, for_run: bool, watch: Watch) -> SourceCheck:
    data, limit = recipe.data, recipe.images.decode_limit
    loaded = load(source, data, decode_limit=limit, role=role, decode=True, watch=watch)
    rows, others, notes = loaded.rows, list[BadRow](), list(loaded.notes)
    if role == "cold_start":
        given = grade_given(rows)
        wrong = ((row, given.get(row.problem.id)) for row in rows)
        others += [
            row.refused(why) for row, each in wrong if each and (why := why_left_out(each, recipe.teacher))
        ]
        notes += sentences(rows, given, recipe.teacher)
        others += unanswerable(rows, recipe.teacher) if for_run else []
    refusal = ""
    if for_run:
        too_long, longest = count_prompts(rows, role, recipe)
        others += too_long
        try:
            require_usable(loaded, data)
            if error := too_many(
                role, too_long, recipe, usable=len(rows), unread=len(loaded.bad), longest=longest
            ):
                raise error
            if role == "rl":
                by_pass_rate([row.problem for row in rows], data)
        except DataError as refused:  # its further lines are among the bad rows
            refusal = f"{refused.what.splitlines()[0]}\n  -> {refused.fix}"
    other_ids = {each.id for each in others}
    check = RowCheck(_prompt_limit(recipe), golds=data.answers == "unwrapped")
    for place, row in enumerate(rows):
        check.add(place, row, usable=row.problem.id not in other_ids)
    bad = [*loaded.bad, *check.settle(), *others]
    bad_ids = {each.id for each in bad}
    good = tuple(row for row in rows if row.problem.id not in bad_ids)
    notes += check.tally.notes
    notes += _batch_notes(role, len(good), recipe) if for_run else _length_notes(check.tally, recipe)
    return SourceCheck(
        role=role,
        source=source,
        usable=len(good),
        rows=rows,
        good=good,
        bad=_once(bad),
        notes=tuple(notes),
        kinds=check.tally.kinds,
        refusal=refusal,
    )


def _prompt_limit(recipe: Recipe) -> PromptLimit:
    return PromptLimit(tokens=recipe.prompt.max_tokens, pixels=recipe.images.max_pixels)


def _once(bad: Sequence[BadRow]) -> tuple[BadRow, ...]:
    """The bad rows, each with its first reason."""
    first: dict[tuple[str, str], BadRow] = {}
    for row in bad:
        first.setdefault((row.where, row.id), row)
    return tuple(first.values())


def _batch_notes(role: Role, count: int, recipe: Recipe) -> list[str]:
    """A note if there are fewer rows than one step takes."""
    sizes = {
        "cold_start": ("sft.batch_size", recipe.sft.batch_size),
        "rl": ("grpo.prompts_per_step", recipe.grpo.prompts_per_step),
    }
    key, size = sizes.get(role, ("", 0))
    if not 0 < count < size:
        return []
    return [f"{count:,} rows are fewer than {key}={size}: a step takes some of them several times"]


def _length_notes(tally: Tally, recipe: Recipe) -> list[str]:
    """About how many tokens the longest prompt has, if it is longer than the recipe allows."""
    limit, (longest, name) = recipe.prompt.max_tokens, tally.longest
    if longest <= limit:
        return []
    return [
        f"{tally.num_too_long:,} rows have prompts of more than {limit} tokens (the limit of {recipe.name}): "
        f"set prompt.max_tokens in your recipe (row {name[:40]} has about {longest:,}); "
        "--recipe counts exactly"
    ]


def check_recipe_data(
    recipe: Recipe, watch: Callable[[str, int], None] = lambda *_: None
) -> tuple[dict[str, SourceCheck], dict[str, str], list[str]]:
    """Check all sources that a run of the recipe reads, then the overlap of training and test.

    Returns what was found in each source by its name, errors of sources that cannot be read, and notes.
    """
    checks: dict[str, SourceCheck] = {}
    errors: dict[str, str] = {}
    for name, (source, role) in sources_of(recipe.study, recipe.data, recipe.validation).items():
        try:
            found = check_source(source, role, recipe, for_run=True, watch=partial(watch, name))
            checks[name] = found
        except DataError as error:
            errors[name] = str(error)
    rows = {name: check.rows for name, check in checks.items()}
    data = RunData(
        cold_start=rows.get("cold_start", ()),
        rl=_problems(rows.get("rl", ())),
        test=_problems(rows.get("test", ())),
    )
    try:
        notes = list(compare_with_test(data, recipe.data).notes)
    except DataError as error:
        errors["overlap"], notes = str(error), []
    return checks, errors, notes


def _problems(rows: Sequence[Row]) -> tuple[Problem, ...]:
    return tuple(row.problem for row in rows)
