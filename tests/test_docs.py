"""The documentation builds without a warning, and every command, key, option and default in it exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from rlcs.cli.main import app
from rlcs.recipe.loading import list_recipes, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"mine.yaml", "evaluation/evaluate.py", "evaluation/calculate_score.py"}
"""Files that pages name and that are not ours: the reader's own, and the official scripts."""
WITH_A_RECIPE = ("run", "sft", "grpo", "distill", "ablate", "plan", "quickstart")


def commands(page: Path) -> list[str]:
    """Every line of a code block that starts rlcs, with continued lines joined."""
    found = []
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "bash", "console", "sh"):
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = line.removeprefix("$ ").strip()
            if words.startswith("rlcs ") or " -m rlcs " in words or re.match("docker run .* rlcs ", words):
                found.append(words)
    return found


ALL = [pytest.param(line, id=f"{p.stem}: {line[:60]}") for p in PAGES for line in commands(p)]


def after_rlcs(words: list[str]) -> list[str]:
    """The words that rlcs gets, also where python, torchrun or a container starts it."""
    starts = [place for place, word in enumerate(words) if word == "rlcs"]
    by_module = [place for place in starts if words[place - 1] == "-m"]
    return words[(by_module or starts)[0] + 1 :]


def parse(command: Any, name: str, words: list[str]) -> tuple[str, dict[str, object]]:
    """The verb and its arguments as the command line understands them. Raises a usage error."""
    if hasattr(command, "resolve_command"):
        verb, inner, rest = command.resolve_command(command.context_class(command, info_name=name), words)
        return parse(inner, verb, rest)
    return name, command.make_context(name, words).params


@pytest.mark.parametrize("line", ALL)
def test_command_is_understood(line):
    words = shlex.split(line.split(" | ")[0].partition(" > ")[0], comments=True)
    words = after_rlcs(words)
    verb, given = parse(typer.main.get_command(app), "rlcs", words)
    # `rlcs distill` says data.problems for what a whole run calls data.cold_start.
    said = given.get("overrides") or ()
    overrides = [str(each).replace("data.problems=", "data.cold_start=") for each in said]
    if verb in WITH_A_RECIPE and overrides:
        recipe = str(given.get("recipe", "quickstart"))
        load_recipe(recipe if recipe in list_recipes() else "quickstart", overrides)


def test_there_are_commands_to_understand():
    assert len(ALL) > 60


def test_pages_build_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
    )
    assert built.returncode == 0, built.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "reasons about what it sees" in home and "fonts.googleapis" not in home


def test_links_of_pages_outside_the_site_lead_somewhere():
    links = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)")
    found = [
        (page.name, path, anchor)
        for page in ROOT.glob("*.md")
        for path, anchor in links.findall(page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 25
    for page, path, anchor in found:
        assert (ROOT / path).exists(), f"{page}: {path}"
        assert not anchor or anchor in anchors_of(ROOT / path), f"{page}: {path}#{anchor}"


def test_files_that_pages_name_exist():
    pattern = re.compile(r"`([\w/.]+\.(?:py|yaml|j2))`|\b((?:src|tests|bench|tools|examples)/[\w/.]+\w)")
    folders = [ROOT / name for name in ("src", "tests", "bench", "tools", "examples")]
    there = [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*")]
    found = {
        (page.name, name or path)
        for page in [*PAGES, ROOT / "CHANGELOG.md"]
        for name, path in pattern.findall(page.read_text(encoding="utf-8"))
    }
    named = {(page, name) for page, name in found if name not in ELSEWHERE}
    assert len(named) > 25
    assert not [each for each in named if not any(f"/{path}".endswith(f"/{each[1]}") for path in there)]


def anchors_of(page: Path) -> set[str]:
    """What links may name: its headings, small, with hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}


def test_the_tree_of_the_readme_is_that_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(code for _, code in FENCE.findall(text) if code.startswith("src/rlcs/"))
    source = ROOT / "src" / "rlcs"
    named = [line.split()[0] for line in tree.splitlines() if re.match(r"  \S", line)]
    there = {path.name + "/" * path.is_dir() for path in source.iterdir() if path.name[0] != "_"}
    assert there - {"py.typed"} == set(named), "every package and module of the root, and no other"
    inside = ""
    for line in tree.splitlines():
        if not line.startswith("   "):
            inside = line.split()[0] if line.startswith("  ") else ""
        for name in re.findall(r"\b\w+\.(?:py|html\.j2)|\b\w+/", line if inside.endswith("/") else ""):
            assert name == inside or any(source.glob(f"{inside}**/{name}")), f"{inside} has no {name}"
