"""The verbs that put a model to use: serve, generate."""

import json as jsonlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from rlcs.cli_options import with_options
from rlcs.errors import UserError

serving_app = typer.Typer()

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or builtin")]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `rlcs serve`: one field, one option."""

    host: Annotated[str, typer.Option(help="Address to listen at; loopback unless told otherwise")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000
    api_key: Annotated[
        str | None, typer.Option(envvar="RLCS_API_KEY", help="Clients must bring this key")
    ] = None
    engine: Annotated[str, typer.Option(help="local, vllm, or auto: vllm where it is installed")] = "auto"
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: MODEL")] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Answers generated at once")] = 32
    queue: Annotated[int, typer.Option(min=0, help="Further requests that may wait")] = 64
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer")] = 4096
    max_images: Annotated[int, typer.Option(min=0, help="Images a request")] = 8
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels an image, in its file")] = 1 << 24
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes a request")] = 32 << 20
    request_s: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take")] = 600.0


@serving_app.command()
@with_options(ServeOptions)
def serve(model: ModelName, **chosen: Any) -> None:
    """An OpenAI-compatible server with images: /v1/chat/completions, /v1/models, /health, /metrics."""
    import shutil

    options = ServeOptions(**chosen)
    if options.engine not in ("auto", "local", "vllm"):
        raise UserError(f"no engine {options.engine!r}", where="--engine", fix="known: auto, local, vllm")
    if options.api_key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo(f"anybody who reaches {options.host} may use the model: no --api-key", err=True)
    vllm = shutil.which("vllm") if options.engine != "local" else None
    if vllm is not None:
        _exec_vllm(vllm, model, options)
    if options.engine == "vllm":
        raise UserError("vllm is not installed", where="--engine", fix="pip install vllm, or --engine local")
    _serve_locally(model, options)


def _exec_vllm(program: str, model: str, options: ServeOptions) -> None:
    """Become `vllm serve`, with our limits as far as it knows such."""
    import os

    from rlcs.models import resolve

    if options.api_key is not None:
        os.environ["VLLM_API_KEY"] = options.api_key
    flags = {
        "--host": options.host,
        "--port": str(options.port),
        "--served-model-name": options.name or model,
        "--max-num-seqs": str(options.concurrency),
        "--limit-mm-per-prompt": jsonlib.dumps({"image": options.max_images, "video": 0}),
        "--allowed-media-domains": "nowhere.invalid",  # data: URLs alone: it fetches nothing for others
    }
    words = [program, "serve", resolve(model), *(word for pair in flags.items() for word in pair)]
    typer.echo(f"engine   vllm\nrunning  {' '.join(words)}")
    sys.stdout.flush()
    os.execv(program, words)  # noqa: S606 (a list of arguments, no shell)


def _serve_locally(model: str, options: ServeOptions) -> None:
    from rlcs import models
    from rlcs.recipe.schema import Model
    from rlcs.serving import server
    from rlcs.serving.protocol import Limits
    from rlcs.serving.session import Session

    limits = Limits(
        max_images=options.max_images,
        max_pixels=options.max_pixels,
        max_tokens=options.max_tokens,
        max_body_bytes=options.max_body_bytes,
        concurrency=options.concurrency,
        queue=options.queue,
        request_s=options.request_s,
    )
    with server.listen(options.host, options.port) as sock:
        session = Session(models.load(Model(name=model)), name=model, max_rows=limits.concurrency)
        service = server.Service(
            session=session, name=options.name or model, limits=limits, key=options.api_key
        )
        host, port = sock.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        typer.echo(f"engine   local\nmodel    {service.name}\nserving  http://{where}:{port}/v1")
        sys.stdout.flush()
        try:
            server.run(service, sock)
        except KeyboardInterrupt:  # uvicorn has shut down gracefully, and passes the signal on
            typer.echo("stopped")
