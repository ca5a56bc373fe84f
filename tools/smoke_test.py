"""Use an installed rlcs as a first user would, without the repository: `python -I tools/smoke_test.py`.

`-I` keeps the repository off the path. Everything happens in a temporary folder, on the built-in model, in
about a minute: version, doctor, recipes, data, a study of seconds, its report, an answer, an export. With
`--short` behind the version it is the version and the study alone, which reads most of the package's files.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

SHORT = (
    "data.cold_start=builtin:puzzles?count=8&seed=1",
    "data.rl=builtin:puzzles?count=8&seed=2",
    "data.test=builtin:puzzles?split=test&count=4&seed=3",
    "sft.epochs=1",
    "sft.batch_size=4",
    "grpo.steps=2",
    "grpo.prompts_per_step=4",
    "grpo.group_size=2",
    "grpo.max_new_tokens=16",
    "eval.max_new_tokens=16",
)
"""Settings that make the study one of seconds."""


def rlcs(folder: Path, *arguments: str) -> str:
    """What one command prints; its failure ends the test with what it printed."""
    command = [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", "rlcs", *arguments]
    print("$ rlcs", *arguments, flush=True)  # noqa: T201
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Run the commands one after the other and look at what they leave."""
    spec = importlib.util.find_spec("rlcs")
    if spec is None or spec.origin is None or "site-packages" not in spec.origin:
        sys.exit(f"rlcs is not an installed package here: {spec and spec.origin}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = sys.argv[1] if len(sys.argv) > 1 else ""
        version = rlcs(folder, "--version").split()[-1]
        if expected and version != expected:
            sys.exit(f"version {version} is installed, and {expected} was built")
        whole = "--short" not in sys.argv
        before = (("doctor",), ("recipes", "ls"), ("data", "check", "builtin:puzzles?count=4"))
        for words in before if whole else ():
            rlcs(folder, *words)
        rlcs(folder, "run", "quickstart", "--out", "run", *SHORT)
        if whole:
            rlcs(folder, "report", "run")
        page = (folder / "run" / "report" / "index.html").read_text(encoding="utf-8")
        if "<html" not in page:
            sys.exit("the report is no page")
        if whole:
            rlcs(folder, "export", "run", "--out", "exported")
            rlcs(folder, "generate", "exported", "What is 2 + 3?", "--max-tokens", "8")
    print(f"rlcs {version} works")  # noqa: T201


if __name__ == "__main__":
    main()
