"""The commands that publish a model: export, publish."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from rlcs.cli.options import DryRun, Private, Repository
from rlcs.cli.output import print_result
from rlcs.errors import UserError
from rlcs.storage import at_home

publish_app = typer.Typer()


@publish_app.command("export")
def export_model(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, model folder, hub id or builtin")
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder")],
    arm: Annotated[
        str | None,
        typer.Option(help="Which model of a run: sft_grpo, grpo, sft or base; default: the first there is"),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="A kept checkpoint of that arm; the same as RUN@STEP")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as trained")] = None,
    quantise: Annotated[
        str | None, typer.Option(help="int8 or int4: the language model's weights in fewer bits")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="OWNER/NAME that the card shows; default: the folder's name")
    ] = None,
) -> None:
    """Write a Hugging Face folder with a model card. Stock transformers and vLLM load it."""
    known = ("bf16", "fp16", "fp32")
    if dtype is not None and dtype not in known:
        raise UserError(f"no precision {dtype!r}", where="--dtype", fix=f"use {', '.join(known)}")
    from rlcs.publish.export import Export, export

    wanted = Export(model=model, out=out, arm=arm, step=step, dtype=dtype, name=name, quantise=quantise)
    for path in export(wanted):
        typer.echo(path)
    typer.echo(f"next: read {out / 'README.md'}, then rlcs publish {out} OWNER/NAME --dry-run")


@publish_app.command("publish")
def publish(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder that `rlcs export` wrote, or a run, as RUN@STEP")
    ],
    repo: Repository,
    private: Private = True,
    dry_run: DryRun = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Also send files of this pattern, like 'examples/*'")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The list as JSON, with whole hashes")] = False,
) -> None:
    """Upload an exported model to the hub. Refuses files that do not belong to a model."""
    if json and not dry_run:
        raise UserError("--json is for the list of a dry run", where="--json", fix="add --dry-run")
    with _exported(model, repo) as folder:
        _publish(folder, repo, private=private, dry_run=dry_run, allow=allow or [], json=json)


@contextmanager
def _exported(name: str, repo: str) -> Iterator[Path]:
    """A folder that was exported; of a run's model one that is made for the moment, its card for `repo`."""
    from rlcs.model.source import find_source, part_of_run

    path = at_home(name)
    is_exported = (path / "README.md").is_file() or (path.is_dir() and part_of_run(path) is None)
    if is_exported or find_source(name).run is None:
        yield path
        return
    from rlcs.publish.export import Export, export

    with TemporaryDirectory(prefix="rlcs-") as folder:
        out = Path(folder) / "model"
        export(Export(model=name, out=out, name=repo))
        yield out


def _publish(folder: Path, repo: str, *, private: bool, dry_run: bool, allow: list[str], json: bool) -> None:
    from rlcs.publish import hub
    from rlcs.publish.checks import refusals

    entries = hub.listing(folder)
    refused = refusals(folder, entries, allow)
    if dry_run:
        files = [asdict(entry) for entry in entries]
        result = {"repo": repo, "files": files, "refused": dict(refused)}
        print_result(result, hub.lines(entries, repo), json=json)
    if refused:
        what = "; ".join(f"{path}: {why}" for path, why in refused[:10])
        fix = "take them out of the folder, or name them with --allow"
        raise UserError(
            f"{len(refused):,} files do not belong in a published model: {what}", where=str(folder), fix=fix
        )
    if repo not in (folder / "README.md").read_text(encoding="utf-8"):
        note = f"note: the card's snippets do not name {repo}; `rlcs export --name {repo}` writes them so"
        typer.echo(note, err=True)
    if not dry_run:
        typer.echo(hub.push(folder, repo, entries, kind="model", private=private))
