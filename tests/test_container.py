"""The container file: what a linter says of it, and that what it copies and installs is there."""

import re
import shlex
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import typer

from rlcs.cli.main import app
from test_docs import after_rlcs, parse

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "how-to" / "container.md").read_text(encoding="utf-8")
STARTED = [line for line in PAGE.splitlines() if line.startswith("docker run")]
LINTER = Path(sysconfig.get_path("scripts")) / "hadolint"


@pytest.mark.skipif(not LINTER.exists(), reason="there is no hadolint for this machine")
def test_the_linter_has_nothing_to_say(tmp_path):
    assert subprocess.run([LINTER, ROOT / "Dockerfile"], capture_output=True, text=True).stdout == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(TEXT.replace("--no-cache-dir ", ""), encoding="utf-8")
    assert "DL3042" in subprocess.run([LINTER, worse], capture_output=True, text=True).stdout


def test_what_it_copies_is_there_and_not_ignored():
    copied = [word for line in re.findall(r"^COPY (.+)$", TEXT, re.M) for word in line.split()[:-1]]
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert len(copied) == 5 and sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)


def test_the_extras_it_installs_exist():
    extras = re.search(r'"\.\[(.+)\]"', TEXT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extras is not None and set(extras[1].split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("line", STARTED)
def test_what_the_page_starts_in_it_is_understood(line):
    words = shlex.split(line.replace('"$PWD', '"/here'))
    words = after_rlcs(words)
    parse(typer.main.get_command(app), "rlcs", words)


def test_the_page_starts_something():
    assert len(STARTED) == 5
