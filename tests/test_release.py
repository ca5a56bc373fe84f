"""The distributions hold what the package needs, install without the repository, and list what they bring."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

VERSION = version("rlcs")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built as `make release` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_every_file_of_the_package(distributions: Path) -> None:
    [wheel] = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("rlcs/")}
    tracked = subprocess.run(
        ["/usr/bin/env", "git", "ls-files", "src/rlcs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found == {name.removeprefix("src/") for name in tracked}


def test_the_source_distribution_can_be_built_and_tested(distributions: Path) -> None:
    [archive] = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    wanted = {
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "tools/smoke_test.py",
        "LICENSE",
    }
    assert wanted <= names
    assert not [name for name in names if "/.venv" in name or name.startswith(("runs/", ".git/"))]


def test_an_installed_wheel_is_used_without_the_repository(distributions: Path, tmp_path: Path) -> None:
    """In short: `make release` does it with everything, for both distributions."""
    [wheel] = distributions.glob("*.whl")
    site = tmp_path / "site-packages"
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    # The dependencies come from this environment, and the package from the wheel.
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import importlib.util; print(importlib.util.find_spec('rlcs').origin)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    smoke = [sys.executable, str(ROOT / "tools" / "smoke_test.py"), VERSION, "--short"]
    done = subprocess.run(smoke, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"rlcs {VERSION} works\n")


def test_the_bill_of_materials_names_what_is_installed(tmp_path: Path) -> None:
    """With the command of `make release`, of an environment that holds one package."""
    venv.create(tmp_path / "env", with_pip=False)
    [site] = tmp_path.glob("env/lib/python*/site-packages")
    about = site / "someone-1.2.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: someone", "Version: 1.2", "License-Expression: MIT", ""]
    (about / "METADATA").write_text("\n".join(lines), encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [found] = re.findall(r"cyclonedx-py (environment .*?) -o ", makefile, flags=re.DOTALL)
    arguments = found.replace("\\\n", " ").replace("$(RELEASE_VENV)", str(tmp_path / "env")).split()
    file = tmp_path / "bill.json"
    command = [sys.executable, "-m", "cyclonedx_py", *arguments, "-o", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bill = json.loads(file.read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "rlcs"
    [part] = bill["components"]
    assert (part["name"], part["version"]) == ("someone", "1.2") and "MIT" in json.dumps(part["licenses"])


def test_the_changelog_begins_with_this_version() -> None:
    headings = [
        line
        for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("## ")
    ]
    assert headings[0].split()[1] == VERSION
