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
import yaml

from rlcs.cli.main import app
from rlcs.recipe.arms import arms_override
from rlcs.recipe.keys import recipe_keys
from rlcs.recipe.loading import list_recipes, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"mine.yaml", "evaluation/evaluate.py", "evaluation/calculate_score.py"}
"""Files that pages name and that are not ours: the reader's own, and the official scripts."""
WITH_A_RECIPE = ("run", "sft", "grpo", "distill", "ablate", "coldstart", "plan", "quickstart")


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
        name = recipe if recipe in list_recipes() else "quickstart"
        load_recipe(name, [*arms_override(verb), *overrides])


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


# ------------------------------------------------------------------------ keys, options, defaults, programs

KEYS = recipe_keys()
SECTIONS = {key[: place.start()] for key in KEYS for place in re.finditer(r"\.", key)}
OTHER_KEYS = {"data.problems"}
"""What `rlcs distill` alone calls data.cold_start; the other names are in the first column of a table."""
OTHER_TRAINERS = "docs/explanation/coming-from.md"
OPTIONS_OF_OTHERS = {
    "--weight-transfer-config": "vllm serve",
    "--enable-return-routed-experts": "vllm serve",
    "--enable-prefix-caching": "vllm serve",
    "--no-verify": "git commit",
    "--nproc-per-node": "torchrun",
    "--shutdown-timeout": "torchrun",
    "--user": "docker run",
    "--shm-size": "docker run",
    "--cpus": "docker run",
    "--cpuset-cpus": "docker run",
    "--speculative-config": "vllm serve",
    "--max-model-len": "vllm serve",
    "--enable-scale-out": "vllm serve",
    "--mm-processor-kwargs": "vllm serve",
    "--teacher": "python -m tools.tiny_model",
    "--width": "python -m bench.adapters, python -m bench.loading",
    "--vllm": "python -m bench.adapters",
    "--cpu-time": "python -m bench",
    "--work": "python -m bench",
    "--write-docs": "python -m bench",
    "--logdir": "tensorboard",
}
"""Options in the text that are not of rlcs, and whose they are."""
PROGRAMS = {
    "rlcs": "tests/test_docs_run.py runs them",
    "docker": "tests/test_container.py reads the Dockerfile",
    "git": "nothing of ours",
    "make": "its targets are compared with the Makefile",
    "pip": "extras are compared with pyproject.toml",
    "python": "its modules are looked up",
    "pytest": "its files are looked up",
    "torchrun": "tests/test_distributed.py starts it",
    "srun": "Slurm",
    "scontrol": "Slurm",
    "head": "a part of every system",
    "vllm": "tests/test_vllm*.py",
    "chromium": "tests/test_chat_page.py starts it",
}
"""Programs that pages start, and how it is known that the commands exist."""


def in_backticks(page: Path) -> list[str]:
    """What the text of a page marks as code."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]


def test_keys_in_the_text_exist():
    tops = {key.split(".")[0] for key in KEYS}
    named = {
        (page.name, name)
        for page in PAGES
        for words in in_backticks(page)
        for name in re.findall(r"(?<![\w./@-])([a-z]\w*(?:\.\w+)+)(?=$|[=:, ])", words)
        if name.split(".")[0] in tops and not name.endswith((".py", ".jsonl", ".yaml", ".md"))
    }
    theirs = FENCE.sub("", (ROOT / OTHER_TRAINERS).read_text(encoding="utf-8"))
    columns = [line.rpartition(" | ")[0] for line in theirs.splitlines() if line.startswith("|")]
    unknown = {
        (page, name)
        for page, name in named
        if name not in {*KEYS, *SECTIONS, *OTHER_KEYS}
        and not (page == "coming-from.md" and any(f"`{name}`" in line for line in columns))
    }
    assert len(named) > 100 and not unknown


def options_of(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    own = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_options_in_the_text_exist():
    known = options_of(typer.main.get_command(app)) | {"--help"}
    named = {
        (page.name, option)
        for page in PAGES
        if page != ROOT / OTHER_TRAINERS
        for words in in_backticks(page)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", words)
    }
    unknown = {each for each in named if each[1] not in known | OPTIONS_OF_OTHERS.keys()}
    assert len(named) > 80 and not unknown
    assert OPTIONS_OF_OTHERS.keys() <= {option for _, option in named} - known, "named here without need"


def value_of(text: str) -> object:
    """A default as pages write it: 1%, 1,000,000, {} or a word."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return yaml.safe_load(text.replace(",", "") if text[:1].isdigit() else text)


def test_defaults_beside_keys_are_those_of_the_schema():
    """As `key` (5); a key may lack its sections, where all that end so have that default."""
    wrong, found = [], 0
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for name, value in re.findall(r"`([a-z][\w.]*)` \(`?([\d.,]+%?|\{\}|null|true|false)`?\)", text):
            keys = [key for key in KEYS if f".{key}".endswith(f".{name}")]
            defaults = [KEYS[key].get_default(call_default_factory=True) for key in keys]
            found += bool(keys)
            if keys and value_of(value) not in defaults:
                wrong.append((page.name, name, value, defaults))
    assert found > 10 and not wrong


def test_yaml_of_pages_is_a_recipe_or_a_part_of_one(tmp_path):
    found = 0
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "yaml" or "apiVersion" in code:  # Kubernetes
                continue
            recipe = tmp_path / f"{found}.yaml"
            whole = code if "extends:" in code else f"extends: quickstart\n{code}"
            recipe.write_text(whole, encoding="utf-8")
            load_recipe(str(recipe))
            found += 1
    assert found >= 4


def shell_lines(page: Path) -> list[str]:
    """Every line of the shell blocks of a page, with continued lines joined."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    return [
        line.strip()
        for language, code in blocks
        if language in ("", "bash", "sh", "console")
        for line in re.sub(r"\\\n *", " ", code).splitlines()
        if line.strip() and not line.startswith("#")
    ]


def programs(line: str) -> list[list[str]]:
    """The commands of a line as words, without variables before them and descriptions after them."""
    found = []
    line = re.sub(r"^\w+=\$\(", "", re.split(r" {2,}", line)[0])
    for part in re.split(r" && | \| (?=\w+ )", line):
        words = shlex.split(part.replace("<this repository>", "URL"), comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words and words[0] != "source" and words[0] != "cd":
            found.append([re.sub(r"^.*/bin/|3$", "", words[0]), *words[1:]])
    return found


def test_programs_in_shell_blocks_and_what_they_name_exist():
    names = {"Makefile": r"^([\w-]+):", "pyproject.toml": r"^([\w-]+) = \["}
    targets, extras = (
        re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        for file, pattern in names.items()
    )
    used = set()
    for page in PAGES:
        for words in [words for line in shell_lines(page) for words in programs(line)]:
            where = f"{page.name}: {' '.join(words)}"
            assert words[0] in PROGRAMS, where
            used.add(words[0])
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= set(targets), where
            for extra in re.findall(r"\[(\w+)\]", " ".join(words)) if words[0] == "pip" else ():
                assert extra in extras, where
            if words[0] == "pytest":
                assert (ROOT / words[1]).is_file(), where
            module = re.search(r"-m (bench(?:\.\w+)?)", " ".join(words))
            if module:
                path = ROOT / module[1].replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), where
    assert used == PROGRAMS.keys(), "named here without need"
