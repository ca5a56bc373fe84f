"""The command line as people meet it: help that fits, near words, completion, quick answers to mistakes."""

import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from rlcs.cli import completion
from rlcs.cli import main as cli
from rlcs.cli.help_examples import EXAMPLES
from rlcs.cli.main import app
from rlcs.recipe.loading import load_recipe

BASH = shutil.which("bash")
COMMANDS = typer.main.get_command(app)


def verbs(command=COMMANDS, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*path, name))


def rlcs(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", **variables}
    command = [sys.executable, "-W", "ignore", "-m", "rlcs", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("path", list(verbs()), ids=lambda path: " ".join(path) or "rlcs")
def test_help_fits_a_screen(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*path, "--help"], prog_name="rlcs", terminal_width=80)
    assert shown.exit_code == 0
    lines = shown.output.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 50, shown.output


def test_every_option_and_argument_says_what_it_is():
    for path in verbs():
        command = COMMANDS
        for name in path:
            command = command.commands[name]
        assert command.get_short_help_str() or not path, path
        for parameter in command.params:
            assert getattr(parameter, "help", ""), f"{' '.join(path)} {parameter.name}"


def test_every_command_has_examples_that_it_understands():
    commands = {" ".join(path) for path in verbs() if path and path not in {("data",), ("recipes",)}}
    assert commands == set(EXAMPLES)
    for name, lines in EXAMPLES.items():
        for line in lines:
            words = shlex.split(line.partition("rlcs ")[2])
            assert " ".join(words).startswith(name)
            command, context = COMMANDS, None
            while hasattr(command, "resolve_command"):
                context = context or command.context_class(command, info_name="rlcs")
                verb, command, words = command.resolve_command(context, words)
            command.make_context(verb, words)
            if name in ("run", "sft", "grpo", "ablate", "coldstart", "quickstart", "plan"):
                load_recipe("quickstart", [word for word in words if "=" in word])


@pytest.mark.parametrize("path", [(), ("run",), ("data", "check")])
def test_short_help_is_the_help(path):
    short, long = (CliRunner().invoke(app, [*path, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.output == long.output


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"rlcs {version('rlcs')}\n"


def test_an_unknown_verb_suggests_the_near_one():
    wrong = rlcs("rnu")
    assert wrong.returncode == 2 and "Did you mean 'run'?" in wrong.stderr


@pytest.mark.skipif(not BASH, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("rlcs re", {"report", "recipes"}),
        ("rlcs data ch", {"check"}),
        ("rlcs run pap", {"paper-3b", "paper-7b"}),
        ("rlcs run quickstart grpo.clip_", {"grpo.clip_low=", "grpo.clip_high=", "grpo.clip_dual="}),
        ("rlcs recipes explain grpo.kl.", {"grpo.kl.kind", "grpo.kl.coefficient"}),
        ("rlcs eval builtin --benchmarks mathver", {"mathverse"}),
    ],
)
def test_bash_completes_with_the_script_that_is_shown(words, offered, tmp_path):
    program = tmp_path / "rlcs"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -m rlcs "$@"\n')
    program.chmod(0o755)
    count = len(words.split()) - 1
    typed = (
        'eval "$(rlcs --show-completion bash)"; '
        f'COMP_WORDS=({words}); COMP_CWORD={count}; _rlcs_completion rlcs; echo "${{COMPREPLY[*]}}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([BASH, "-c", typed], capture_output=True, text=True, env=environment, timeout=120)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with two runs in `runs/`, a model folder, and a recipe file."""
    monkeypatch.chdir(tmp_path)
    for file in ("runs/mine/recipe.yaml", "runs/other/recipe.yaml", "model/config.json", "own/mine.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "runs" / "mine" / "sft" / "final").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "sft" / "final" / "config.json").touch()


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("offer", "typed", "offered"),
    [
        (completion.models, "", ["builtin", "builtin-hybrid", "runs/mine", "runs/other", "model"]),
        (completion.models, "runs/mine/sft/", ["runs/mine/sft/final"]),
        (completion.recipes, "own/", ["own/mine.yaml"]),
        (completion.recipes, "quick", ["quickstart"]),
        (completion.overrides, "grpo.loss=g", ["grpo.loss=grpo", "grpo.loss=gspo"]),
        (completion.overrides, "no.such.key=", []),
        (
            completion.benchmarks,
            "wemath,mathv",
            ["wemath,mathverse", "wemath,mathvision", "wemath,mathvista"],
        ),
        (completion.models, "nowhere/", []),
    ],
)
def test_what_is_offered(offer, typed, offered):
    found = offer(typed)
    assert [word for word in found if not word.endswith("/")] == offered


def test_a_bad_data_file_is_told_before_anything_heavy_is_loaded(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"id": "1", "question": "What?", "answer": "4"}\n{"id": "2", "question"')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "rlcs",
        "run",
        "quickstart",
        f"data.cold_start={file}",
    ]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert told.returncode == 2 and "train.jsonl:2" in told.stderr
    assert " torch\n" not in told.stderr and " transformers\n" not in told.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert not (tmp_path / "runs").exists(), "a run that cannot start leaves no folder behind"


def test_a_copied_recipe_has_a_name_of_its_own(tmp_path):
    """So its runs do not land in the folder of the recipe that it was copied from."""
    mine = tmp_path / "mine: 2.yaml"
    copied = CliRunner().invoke(app, ["recipes", "copy", "quickstart", str(mine)])
    assert copied.exit_code == 0, copied.output
    recipe, shipped = load_recipe(str(mine)).recipe, load_recipe("quickstart").recipe
    assert recipe == shipped.model_copy(update={"name": "mine: 2"})
    assert "# a quarter of the teacher's answers misread the image" in mine.read_text()


LONG = "x" * 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "quickstart", "--out", "file"], "file: Not a directory"),
        (["run", "quickstart", "--out", LONG], "File name too long"),
        (["data", "export", "builtin:shapes?count=2", "file"], "file: Not a directory"),
        (["data", "export", "builtin:shapes?count=2", LONG], "File name too long"),
        (["recipes", "show", f"{LONG}.yaml"], "File name too long"),
        (["report", LONG], "File name too long"),
    ],
    ids=lambda value: " ".join(value).replace(LONG, "LONG") if isinstance(value, list) else "",
)
def test_a_path_that_cannot_be_used_gets_a_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(sys, "argv", ["rlcs", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and said in errors and "->" in errors


def test_an_error_of_the_system_keeps_its_traceback_unless_it_names_a_file(monkeypatch, capsys):
    def fail(error: OSError):
        def app(**_: object) -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)

    fail(PermissionError(13, "Permission denied", "runs/x/logs"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "runs/x/logs: Permission denied" in capsys.readouterr().err
    fail(OSError("no file"))
    with pytest.raises(OSError, match="no file"):
        cli.main()


def test_a_terminal_that_is_not_utf_8_gets_escapes(random_model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "\u9898", "question": "\u591a\u5c11?"}\n', encoding="utf-8")
    checked = rlcs("data", "check", rows, PYTHONIOENCODING="latin-1")
    assert "\\u9898" in checked.stdout and not checked.stderr, checked.stderr
    looked = rlcs("look", "builtin:shapes", f"model.name={random_model_folder}", PYTHONIOENCODING="ascii")
    assert looked.returncode == 0 and "\\u2580" in looked.stdout, looked.stderr


@pytest.mark.fault("limits", "a path that the locale cannot read", "a sentence that says what to set")
def test_a_path_that_the_locale_cannot_read_is_a_sentence(tmp_path):
    legacy = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = rlcs("data", "check", f"{tmp_path}/é/rows.jsonl", **legacy)
    assert done.returncode == 2 and "export PYTHONUTF8=1" in done.stderr and "Traceback" not in done.stderr
    broken = rlcs("data", "check", f"{tmp_path}/\udcff/rows.jsonl")
    assert broken.returncode == 2 and "rename what is not UTF-8" in broken.stderr
    assert "no such file" in rlcs("data", "check", f"{tmp_path}/é/rows.jsonl", LC_ALL="C").stderr
