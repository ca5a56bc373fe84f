"""The commands that publish a model: export, publish."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rlcs.cli.options import DryRun, ExportedFolder, Private, Repository
from rlcs.cli.output import print_result
from rlcs.errors import UserError

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

    wanted = Export(model=model, out=out, arm=arm, dtype=dtype, name=name, quantise=quantise)
    for path in export(wanted):
        typer.echo(path)
    typer.echo(f"next: read {out / 'README.md'}, then rlcs publish {out} OWNER/NAME --dry-run")


@publish_app.command("publish")
def publish(
    folder: ExportedFolder,
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
    from rlcs.publish import hub
    from rlcs.publish.checks import refusals

    entries = hub.listing(folder)
    refused = refusals(folder, entries, allow or [])
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
