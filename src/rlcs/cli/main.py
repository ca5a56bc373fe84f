"""The command line: one module for each group of commands, which import heavy packages when they run."""

import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlcs.cli.data import data_app
from rlcs.cli.doctor import doctor
from rlcs.cli.evaluate import evaluate_app
from rlcs.cli.help_examples import add_examples
from rlcs.cli.plan import plan
from rlcs.cli.publish import publish_app
from rlcs.cli.recipes import recipes_app
from rlcs.cli.report import report_app
from rlcs.cli.serve import serve_app
from rlcs.cli.train import train_app
from rlcs.cores import find_cores, thread_settings
from rlcs.errors import RlcsError, UserError, out_of_memory_in
from rlcs.redaction import guard_streams

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}
"""Settings of libraries, unless the user has others: no statistics are sent, no bars are drawn."""

_UNREADABLE = re.compile("[\ud800-\udfff]")
"""What stands for bytes that are not text."""

app = typer.Typer(
    name="rlcs",
    help="RL with Cold Start: turn a vision-language model into one that reasons.",
    epilog="Begin with `rlcs doctor` and `rlcs quickstart`; then `rlcs recipes ls`, `rlcs run RECIPE`.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlcs {version('rlcs')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """RL with Cold Start: turn a vision-language model into one that reasons."""


for group in (train_app, evaluate_app, report_app, serve_app, publish_app):
    app.add_typer(group)
app.command()(doctor)
app.command()(plan)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
add_examples(app)


def main() -> None:
    """Run the command line; expected errors go to stderr without a traceback, and set the exit code."""
    threads = thread_settings(find_cores(), os.environ)
    for name, value in (_QUIET | threads).items():
        os.environ.setdefault(name, value)
    guard_streams()
    try:
        _require_readable([*sys.argv[1:], str(Path.cwd())], sys.getfilesystemencoding())
        with out_of_memory_in(""):
            app(prog_name="rlcs")
    except RlcsError as error:
        _exit_with(error)
    except OSError as error:
        if error.filename is None:  # without a file name the traceback is needed
            raise
        fix = "check the path and its permissions, or name another"
        _exit_with(UserError(error.strerror or str(error), where=str(error.filename), fix=fix))
    except KeyboardInterrupt:
        sys.stderr.write("rlcs: stopped; the same command continues from the last checkpoint\n")
        sys.exit(130)


def _require_readable(words: Sequence[str], encoding: str) -> None:
    """Raise UserError for words with characters that libraries would write as others, or not at all."""
    for word in words:
        if not word.isascii() and (encoding != "utf-8" or _UNREADABLE.search(word)):
            what = f"it has characters that cannot be read in this locale (file names in {encoding})"
            raise UserError(what, where=ascii(word), fix="export PYTHONUTF8=1, or rename what is not UTF-8")


def _exit_with(error: RlcsError) -> NoReturn:
    if not error.reported:
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        sys.stderr.write(f"rlcs{rank}: {error}\n")
    sys.exit(error.exit_code)
