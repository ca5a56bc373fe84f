"""The command `rlcs doctor`."""

import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from errno import EISDIR
from pathlib import Path
from typing import Annotated

import typer

from rlcs.cli.options import Json, with_options
from rlcs.cli.output import print_result
from rlcs.errors import UserError
from rlcs.storage import write_json


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The options of `rlcs doctor`."""

    replay: Annotated[
        bool, typer.Option("--replay", help="Which change would have prevented the collapse of RUN's RL")
    ] = False
    step: Annotated[
        int | None, typer.Option(min=1, help="With --replay: the step of a collapse other than the first")
    ] = None
    gpu: Annotated[bool, typer.Option("--gpu", help="Prove within minutes that the GPUs are ready")] = False
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for --gpu")] = 8.0
    executable: Annotated[str, typer.Option(help="vLLM's program for --gpu")] = "vllm"
    out: Annotated[Path | None, typer.Option(help="File for the JSON of --gpu")] = None
    cpu: Annotated[bool, typer.Option("--cpu", hidden=True, help="On the CPU, with a small model")] = False
    json: Json = False


@with_options
def doctor(
    options: DoctorOptions,
    run: Annotated[Path | None, typer.Argument(help="A run folder to check")] = None,
) -> None:
    """Check this machine and a small model on it, or the run RUN. With --gpu the GPUs, in minutes."""
    if options.gpu:
        if run is not None or options.replay:
            raise UserError("a run is checked without GPUs", where="--gpu", fix="leave out --gpu or the run")
        _gpus(options)
        return
    given = {"--out": options.out, "--cpu": options.cpu, "--executable": options.executable != "vllm"}
    if option := next((name for name, value in given.items() if value), None):
        raise UserError("it belongs to the checks of GPUs", where=option, fix="add --gpu, or leave it out")
    if options.step and not options.replay:
        raise UserError("it says what is replayed", where="--step", fix="add --replay, or leave it out")
    if options.replay:
        if run is None:
            raise UserError("a run is replayed", where="--replay", fix="write rlcs doctor RUN --replay")
        _replay(run, options)
        return
    about: dict[str, str] = {}
    if run is None:
        from rlcs.doctor.machine import checks, facts

        about, findings = facts(), checks()
    else:
        from rlcs.doctor.health import examine

        findings = examine(run)
    lines = [f"{name:<13} {value}" for name, value in about.items()]
    for finding in findings:
        lines.append(f"{'!!' if finding.bad else 'ok'} {finding.name}: {finding.message}")
        lines += [f"   -> {finding.fix}"] if finding.bad else []
    result = {"facts": about, "findings": [asdict(finding) for finding in findings]}
    print_result(result, lines, json=options.json)
    if any(finding.bad for finding in findings):
        raise typer.Exit(1)


def _replay(run: Path, options: DoctorOptions) -> None:
    if os.environ.get("RANK", "0") != "0":  # torchrun: rank 0 alone prints
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    from rlcs.data.run_data import load_run_data
    from rlcs.distributed import join_world
    from rlcs.pipeline.replay import Replay, find_collapse, lines
    from rlcs.progress import Output
    from rlcs.recipe.loading import load_recipe
    from rlcs.signals import StopFlag

    collapse = find_collapse(run, options.step)
    recipe = load_recipe(str(collapse.run / "recipe.yaml"), []).recipe
    limit = recipe.images.decode_limit
    data = load_run_data(recipe.study, recipe.data, decode_limit=limit, validation=recipe.validation)
    parallel, output = recipe.parallel, Output(quiet=True, json=options.json)
    joined = join_world(timeout_s=parallel.timeout_s, shard_size=parallel.shard_size)
    with StopFlag() as stop, joined as world:
        result = Replay(collapse, data, output=output, stop=stop, world=world).run()
        print_result(result, ["", *lines(result, collapse)], json=options.json)


def _require_writable(out: Path | None) -> None:
    """Try before checks that take minutes whether their file can be written. Raises UserError."""
    if out is None:
        return
    try:
        if out.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        what = f"cannot write {out}: {error.strerror}"
        raise UserError(what, where="--out", fix="name a file in a folder that you may write to") from error


def _gpus(options: DoctorOptions) -> None:
    _require_writable(options.out)
    from rlcs.doctor.gpu.start import examine_gpus

    first = os.environ.get("RANK", "0") == "0"  # torchrun: rank 0 alone prints

    def say(text: str) -> None:
        if first:
            typer.echo(text, err=True)

    report = examine_gpus(minutes=options.minutes, executable=options.executable, cpu=options.cpu, say=say)
    if not first:
        return
    print_result(report.content, report.lines, json=options.json)
    sys.stdout.flush()
    if options.out is not None:
        write_json(options.out, report.content)
        typer.echo(f"JSON: {options.out}", err=True)
    if not report.ok:
        raise typer.Exit(1)
