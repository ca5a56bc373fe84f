"""The commands that use a model: serve, generate, chat."""

import json as jsonlib
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from rlcs.cli.options import KeyVariable, ModelName, SamplingOptions, same_fields, with_options
from rlcs.cli.output import print_left_out, print_result
from rlcs.errors import UserError

serve_app = typer.Typer()


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `rlcs serve`."""

    host: Annotated[str, typer.Option(help="Address; default: this machine only")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000
    api_key: Annotated[str | None, typer.Option(envvar="RLCS_API_KEY", help="Key of the clients")] = None
    engine: Annotated[str, typer.Option(help="local, vllm, or auto: vllm where it is installed")] = "auto"
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: MODEL")] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Answers generated at once")] = 32
    queue: Annotated[int, typer.Option(min=0, help="Most requests that wait")] = 64
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer")] = 4096
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a request")] = 8
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of an image file")] = 25_000_000
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request")] = 32 << 20
    request_s: Annotated[float, typer.Option(min=0.001, help="Most seconds of a request")] = 600.0
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages of this origin may ask; repeat it; *: all")
    ] = None
    image_host: Annotated[
        list[str] | None, typer.Option(help="Images may be downloaded from this host; repeat it; *: any")
    ] = None
    tool_parser: Annotated[
        str | None, typer.Option(help="Tool calls, with vLLM: the name of its parser, as hermes")
    ] = None


@serve_app.command()
@with_options
def serve(model: ModelName, options: ServeOptions) -> None:
    """Serve a model with the OpenAI protocol. /v1/chat/completions, /v1/models, /health, /metrics."""
    if options.api_key == "":
        fix = "give a key, or leave the option out for a server without one; is RLCS_API_KEY set to nothing?"
        raise UserError("the key is empty", where="--api-key", fix=fix)
    if options.api_key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo(f"no --api-key: anybody who reaches {options.host} can use the model", err=True)
    for origin in options.cors_origin or ():
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            fix = "write it as browsers send it, without a path: --cors-origin https://app.example.com, or *"
            raise UserError(f"{origin[:80]!r} is no origin", where="--cors-origin", fix=fix)
    if program := chosen_vllm(options.engine):
        _exec_vllm(program, model, options)
    _serve_locally(model, options)


def chosen_vllm(engine: str) -> str | None:
    """The `vllm` program for an `--engine`; None for the local engine. Raises UserError."""
    if engine not in ("auto", "local", "vllm"):
        raise UserError(f"no engine {engine!r}", where="--engine", fix="known: auto, local, vllm")
    # First in the folder of this Python, then on the path.
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    program = shutil.which("vllm", path=os.pathsep.join(folders)) if engine != "local" else None
    if engine == "vllm" and program is None:
        raise UserError("vllm is not installed", where="--engine", fix="pip install vllm, or --engine local")
    return program


def _exec_vllm(program: str, model: str, options: ServeOptions) -> None:
    """Replace this process by `vllm serve`, with those limits that it supports."""
    from rlcs.model.loading import resolve
    from rlcs.serving.defaults import defaults_of
    from rlcs.serving.image_sources import ImageHosts
    from rlcs.serving.remote import NOT_KNOWN, serving

    hosts = ImageHosts(names=tuple(options.image_host or ()))
    launch = replace(
        serving(program, model, name=options.name, key=options.api_key),
        host=options.host,
        max_rows=options.concurrency,
        max_images=options.max_images,
        image_hosts=hosts,
        cors_origins=tuple(options.cors_origin or ()),
        tool_parser=options.tool_parser,
        defaults=defaults_of(model),
    )
    words = launch.command(Path(resolve(model)), options.port)
    typer.echo(f"engine   vllm\nrunning  {' '.join(words)}\nlimits   vLLM has no {', '.join(NOT_KNOWN)}")
    if hosts.names:
        typer.echo("images   vLLM does not check whether an allowed host has a private address")
    sys.stdout.flush()
    os.execve(program, words, launch.environment(0))  # noqa: S606 (a list of arguments, no shell)


def _serve_locally(model: str, options: ServeOptions) -> None:
    if options.tool_parser:
        fix = "take --engine vllm, or leave the option out"
        raise UserError("tool calls need vLLM", where="--tool-parser", fix=fix)
    from rlcs.data.decoder import ImageDecoder
    from rlcs.model import loading
    from rlcs.recipe.schema import Model
    from rlcs.serving import server
    from rlcs.serving.defaults import defaults_of
    from rlcs.serving.image_sources import ImageHosts
    from rlcs.serving.protocol import Limits
    from rlcs.serving.session import Session
    from rlcs.serving.web import listen, run_until_stopped

    limits = Limits(**same_fields(options, Limits))
    hosts = ImageHosts(names=tuple(options.image_host or ()))
    with listen(options.host, options.port) as sock, ImageDecoder() as decoder:
        vlm = loading.load(Model(name=model))
        defaults = defaults_of(model, vlm.model.generation_config.to_dict())
        service = server.Service(
            session=Session(vlm, name=model, max_rows=limits.concurrency, decoder=decoder),
            name=options.name or model,
            limits=limits,
            key=options.api_key,
            defaults=defaults,
            image_hosts=hosts,
        )
        host, port = sock.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        lines = ["engine   local", f"model    {service.name}", f"sampling {defaults}"]
        typer.echo("\n".join([*lines, f"serving  http://{address}:{port}/v1"]))
        sys.stdout.flush()
        run_until_stopped(server.make_app(service, cors_origins=options.cors_origin or ()), sock)
        typer.echo("stopped")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """The options of `rlcs generate`."""

    image: Annotated[list[Path] | None, typer.Option(help="An image; repeat it for several")] = None
    input: Annotated[
        str | None, typer.Option(help="Many questions: JSONL with question, images, id, or a data source")
    ] = None
    output: Annotated[Path | None, typer.Option(help="Their answers as JSONL; continued if there")] = None


@serve_app.command()
@with_options
def generate(
    model: ModelName,
    options: GenerateOptions,
    question: Annotated[str | None, typer.Argument(help="What to ask")] = None,
) -> None:
    """Answer one question about images, or a file of questions. Shown while it is generated."""
    if (options.input is None) == (question is None) or (options.input is None) != (options.output is None):
        fix = 'rlcs generate MODEL "question" --image a.png, or --input rows.jsonl --output answers.jsonl'
        raise UserError("ask one question, or name an input and an output", where="rlcs generate", fix=fix)
    if options.input is not None and options.image:
        raise UserError("the rows of --input name their images", where="--image", fix="leave it out")

    from rlcs.model import loading
    from rlcs.recipe.schema import Model
    from rlcs.serving.session import Session, Settings

    settings = Settings(**same_fields(options, Settings), max_new_tokens=options.max_tokens)
    session = Session(loading.load(Model(name=model)), name=model, max_rows=options.batch)
    if question is not None:
        _answer_one(session, question, options, settings)
    else:
        _answer_many(session, options, settings)


def _answer_one(session: Any, question: str, options: GenerateOptions, settings: Any) -> None:
    stream = session.stream([session.message(options.image, question)], settings)
    try:
        for piece in stream:
            if not options.json:
                typer.echo(piece, nl=False)
    finally:
        stream.close()
    typer.echo(jsonlib.dumps(asdict(stream.answer), ensure_ascii=False) if options.json else "")


def _answer_many(session: Any, options: GenerateOptions, settings: Any) -> None:
    from rlcs.serving.bulk import SessionSampler, answer_questions
    from rlcs.signals import StopFlag

    source, out = str(options.input), options.output
    assert out is not None, "input and output go together"
    sampler = SessionSampler(session=session, settings=settings, ahead=2 * options.batch)
    with StopFlag() as stop:
        tally = answer_questions(sampler, source, out, stop=stop, json=options.json)
    print_left_out("left out", tally.bad)
    numbers = {"answered": tally.answered, "before": tally.before, "left_out": len(tally.bad)}
    counts = f"answered {tally.answered:,} ({tally.before:,} before), left out {len(tally.bad):,}"
    print_result({**numbers, "out": str(out)}, [counts, f"answers  {out}"], json=options.json)
    if not tally.answered + tally.before:
        raise typer.Exit(2)


@serve_app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Run, folder, hub id, builtin (default), or a URL")
    ] = None,
    other: Annotated[
        str | None, typer.Argument(metavar="[MODEL2]", help="A second model, to compare")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address of the page; 0.0.0.0: open to other machines")
    ] = "127.0.0.1",
    engine: Annotated[str, typer.Option(help="local, vllm, or auto: vllm where it is installed")] = "auto",
    url: Annotated[str | None, typer.Option(help="Server that has MODEL: http://localhost:8000/v1")] = None,
    key_env: KeyVariable = "OPENAI_API_KEY",
) -> None:
    """Chat with one model or two on a web page. With images; reasoning is folded."""
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio", where="rlcs chat", fix="pip install 'rlcs[chat]'")
    if url and engine != "auto":
        raise UserError("a server has an engine of its own", where="--engine", fix="leave it out")
    program = None if url else chosen_vllm(engine)
    from rlcs.serving.chat_page import open_models, open_page

    names = [name for name in (model, other) if name is not None]
    with open_models(names, program=program, url=url, key_env=key_env) as models:
        open_page(models, host=host, port=port)
