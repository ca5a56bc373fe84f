"""The commands that measure: eval, grade."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlcs.cli import completion
from rlcs.cli.options import Json, KeyVariable, SamplingOptions, same_fields, with_options
from rlcs.cli.output import print_left_out, print_result
from rlcs.errors import UserError

evaluate_app = typer.Typer()


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The options that name a judge."""

    judge_model: Annotated[str | None, typer.Option(help="Extracts answers, and scores MathVerse")] = None
    judge_url: Annotated[str | None, typer.Option(help="Its server; without one rlcs loads it")] = None
    judge_key_env: Annotated[str, typer.Option(help="Variable with the server's key")] = "OPENAI_API_KEY"
    judge_request: Annotated[
        list[str] | None, typer.Option(help="What the judge is sent, like omit=[temperature]")
    ] = None

    def judge(self) -> Any:
        """The judge: a server's model, one to load, or None. Raises UserError for a server without one."""
        if self.judge_url is None:
            return self.judge_model
        if self.judge_model is None:
            what, fix = "a judge on a server has a model", "give --judge-model too"
            raise UserError(what, where="--judge-url", fix=fix)
        words = self.judge_request
        return _endpoint(
            self.judge_url, self.judge_model, "--judge-request", words, key_env=self.judge_key_env
        )


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SamplingOptions, JudgeOptions):
    """The options of `rlcs eval`."""

    model: Annotated[
        list[str] | None, typer.Option("--model", help="One more model; the same as an argument")
    ] = None
    benchmarks: Annotated[
        str, typer.Option(help="Names, with commas between them", autocompletion=completion.benchmarks)
    ] = "mathvision,mathverse,mathvista,wemath"
    data: Annotated[Path | None, typer.Option(help="Folder with the official files, not the hub")] = None
    out: Annotated[Path, typer.Option(help="Folder of answers and scores")] = Path("runs/eval")
    prompt: Annotated[str, typer.Option(help="paper (boxed system prompt) or official")] = "paper"
    split: Annotated[str | None, typer.Option(help="Default: that of the paper")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions")] = None
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question: mean and pass@k")] = 1
    blind: Annotated[
        str, typer.Option(help="Also without its image: other (another question's image) or removed")
    ] = "none"
    engine: Annotated[str, typer.Option(help="local, vllm_server or vllm_colocated")] = "local"
    rollout: Annotated[list[str] | None, typer.Option(help="Settings of vLLM, like tensor_parallel=2")] = None
    base_url: Annotated[str | None, typer.Option(help="A server, such as http://localhost:8000/v1")] = None
    key_env: KeyVariable = "OPENAI_API_KEY"
    request: Annotated[
        list[str] | None, typer.Option(help="What the server is sent, like omit=[temperature,seed]")
    ] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time")] = 32


@evaluate_app.command("eval")
@with_options
def evaluate(
    options: EvalOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Run, folder, hub id or a server's; or NAME=MODEL",
            autocompletion=completion.models,
        ),
    ] = None,
) -> None:
    """Measure models on benchmarks, beside the paper's numbers. With intervals."""
    run = _eval_run(options)
    named = [*(models or []), *(options.model or [])]
    if not named:
        raise UserError("no model is named", where="rlcs eval", fix="write rlcs eval MODEL, like `builtin`")

    from rlcs.evals.comparison import as_markdown
    from rlcs.evals.run import evaluate_models
    from rlcs.signals import StopFlag
    from rlcs.storage.locks import hold

    with hold(run.out), StopFlag() as stop:
        comparison = evaluate_models(run, named, stop=stop, json=options.json)
    table = f"\n{as_markdown(comparison)}\ntable    {options.out / 'comparison.md'}"
    print_result(comparison, [table], json=options.json)
    if comparison["failed"]:
        raise typer.Exit(1)


def _eval_run(options: EvalOptions) -> Any:
    """Check the options and build the run. Raises UserError for options that do not go together."""
    from rlcs.data.blind import CONTROLS
    from rlcs.data.sources import suggest
    from rlcs.evals.benchmarks.base import STYLES
    from rlcs.evals.run import EvalRun
    from rlcs.recipe.loading import read_section
    from rlcs.recipe.sampling import EngineSettings
    from rlcs.recipe.schema import Eval

    style = next((style for style in STYLES if style == options.prompt), None)
    if style is None:
        fix = suggest(options.prompt, STYLES)
        raise UserError(f"no prompt is called {options.prompt!r}", where="--prompt", fix=fix)
    if (blind := next((way for way in CONTROLS if way == options.blind), None)) is None:
        fix = suggest(options.blind, CONTROLS)
        raise UserError(f"no blind control is called {options.blind!r}", where="--blind", fix=fix)
    if options.samples > 1 and options.temperature == 0:
        fix = "add --temperature 0.7"
        raise UserError("several greedy samples would all be the same", where="--samples", fix=fix)
    if options.base_url and options.engine != "local":
        raise UserError("a server has an engine of its own", where="--engine", fix="leave it out")

    url, at_once = options.base_url, options.concurrency
    endpoint = None
    if url is not None:
        reached = {"key_env": options.key_env, "concurrency": at_once}
        endpoint = _endpoint(url, "", "--request", options.request, **reached)
    words = [f"engine={options.engine}", *(options.rollout or [])]
    shared = same_fields(options, EvalRun) | {
        "benchmarks": tuple(name.strip() for name in options.benchmarks.split(",") if name.strip()),
        "engine": read_section(EngineSettings, words, where="--rollout"),
    }
    return EvalRun(
        **shared,
        style=style,
        sampling=Eval(
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_tokens,
            max_rows=options.batch,
            blind=blind,
        ),
        endpoint=endpoint,
        judge=options.judge(),
    )


def _endpoint(url: str, model: str, option: str, words: list[str] | None, **reached: Any) -> Any:
    """A server of the command line; `words` of its `option` are the recipe's `request` section."""
    from rlcs.recipe.loading import read_section
    from rlcs.recipe.sampling import Endpoint, RequestFields

    request = read_section(RequestFields, words or [], where=option)
    return Endpoint(base_url=url, model=model, section=option, request=request, **reached)


@dataclass(frozen=True, kw_only=True)
class GradeOptions(JudgeOptions):
    """The options of `rlcs grade`."""

    out: Annotated[
        Path | None, typer.Option("--out", help="The same rows with prediction, correct, why and the values")
    ] = None
    rule: Annotated[
        str, typer.Option(help="rlcs, mathvision, mathvista, wemath, or mathverse with a judge")
    ] = "rlcs"
    strict: Annotated[bool, typer.Option("--strict", help="rlcs: only a closed box counts")] = False
    explain: Annotated[
        bool, typer.Option("--explain", help="What was read and which rule decided, wrong rows first")
    ] = False
    ids: Annotated[list[str] | None, typer.Option("--id", help="Explain the row with this id")] = None
    limit: Annotated[int, typer.Option(min=1, help="Explain at most so many rows")] = 20
    response: Annotated[
        str | None, typer.Option(help="Instead of a file: what the model wrote, for one explained verdict")
    ] = None
    gold: Annotated[str | None, typer.Option(help="The gold answer to --response")] = None
    choices: Annotated[str, typer.Option(help="The options of that question, like 'a;b;c'")] = ""
    golds: Annotated[
        Path | None, typer.Option(help="File with the gold answers, joined by id, where rows have none")
    ] = None
    quick_match: Annotated[
        bool, typer.Option("--quick-match", help="mathverse: an extraction must equal the gold answer")
    ] = False
    json: Json = False


@evaluate_app.command()
@with_options
def grade(
    options: GradeOptions,
    file: Annotated[
        Path | None, typer.Argument(help="JSONL or JSON with id, response, answer; choices, extraction, ...")
    ] = None,
) -> None:
    """Grade a file of answers. By the rule of rlcs or a benchmark's official rule; --explain says why."""
    from rlcs.storage import require_regular

    if file is None or (options.response, options.gold) != (None, None):
        _require_one(file, options)
        _grade_pair(options)
        return
    require_regular(file)
    if options.out is None and not options.explain:
        raise UserError("no file is named for the grades", where="rlcs grade", fix="add --out or --explain")

    from rlcs.evals.answer_file import grade_file

    judge, beside = options.judge(), options.out or file
    if judge is not None:
        from rlcs.evals.mathverse_judge import MathVerseJudge

        replies = beside.with_name(f"{beside.name}.judged.jsonl")
        judge = MathVerseJudge(model=judge, replies=replies, quick_match=options.quick_match)

    tally = grade_file(
        file,
        options.out,
        rule=options.rule,
        golds=options.golds,
        allow_fallbacks=not options.strict,
        judge=judge,
    )
    lines = _explanations(tally, file, options)
    numbers = tally.to_json()
    interval = f"[{numbers['low']:.1%}, {numbers['high']:.1%}]"
    accuracy = "accuracy none: no row could be scored"
    if tally.accuracy is not None:
        accuracy = f"accuracy {tally.accuracy:.2%} by {options.rule}   {interval}"
    versions = [f"  {name}: {right / n:.2%} of {n:,}" for name, (right, n) in tally.by_version.items()]
    lines += [
        accuracy,
        *versions,
        *(f"{name:<8} {numbers[name]:,}" for name in ("right", "wrong", "unscored")),
    ]
    out = {} if options.out is None else {"out": str(options.out)}
    print_result(
        {**numbers, **out}, [*lines, *(f"rows     {path}" for path in out.values())], json=options.json
    )
    if tally.accuracy is None:
        raise typer.Exit(2)


def _explanations(tally: Any, file: Path, options: GradeOptions) -> list[str]:
    """The explanations that were asked for. Unscored rows that are not among them are named on stderr."""
    from rlcs.evals.explanation import explain, select

    chosen = select(tally.graded, options.ids or [], options.limit) if options.explain else []
    lines = []
    for row, verdict in chosen:
        head, *rest = explain(row, verdict, rule=options.rule, allow_fallbacks=not options.strict)
        lines += [f"{row.name}: {head}", *rest]
    shown = set() if options.json else {f"{row.name}: {verdict.why}" for row, verdict in chosen}
    if not (shown and options.ids):
        print_left_out("unscored", [f"{file}, {row}" for row in tally.unscored if row not in shown])
    return lines


def _require_one(file: Path | None, options: GradeOptions) -> None:
    """Raise UserError unless one response, with its gold answer and without a file, is to be graded."""
    match (file, options.response, options.gold):
        case (None, None, None):
            what, fix = "nothing to grade is named", "give a file, or --response and --gold"
        case (None, None, _):
            what, fix = "--gold without the response that is graded", "add --response, or name a file"
        case (None, _, None):
            what, fix = "--response without its gold answer", "add --gold"
        case (None, _, _):
            return
        case _:
            what, fix = "a file, and an answer besides", "give a file, or --response and --gold"
    raise UserError(what, where="rlcs grade", fix=fix)


def _grade_pair(options: GradeOptions) -> None:
    """Grade and explain one response without a file."""
    from rlcs.evals.answer_file import AnswerRow, grade_rows, verdict_fields
    from rlcs.evals.explanation import explain

    choices = tuple(choice.strip() for choice in options.choices.split(";")) if options.choices else ()
    row = AnswerRow(
        line=1, fields={}, response=options.response or "", answer=options.gold or "", choices=choices
    )
    ((_, verdict),) = grade_rows([row], rule=options.rule, allow_fallbacks=not options.strict)
    lines = explain(row, verdict, rule=options.rule, allow_fallbacks=not options.strict)
    print_result(verdict_fields(verdict), lines, json=options.json)
    if verdict.correct is None:
        raise typer.Exit(2)
