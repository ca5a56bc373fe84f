"""`import rlcs` as a library: its names, and the example of a training loop of one's own."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

import rlcs

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"
HEAVY = {"torch", "torchvision", "transformers", "datasets"}


def test_own_loop_trains_and_prints_its_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 60
    spec = util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rewards = module.main(steps=3)
    assert len(rewards) == 3 and 0 < max(rewards) < 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"step {step}: reward {reward:.3f}" for step, reward in enumerate(rewards, start=1)
    ]


def test_the_page_shows_the_example_as_it_is() -> None:
    page = EXAMPLE.parent.parent / "docs" / "reference" / "python-api.md"
    assert f"```python\n{EXAMPLE.read_text(encoding='utf-8')}```" in page.read_text(encoding="utf-8")


def test_the_package_is_imported_in_an_instant_and_its_parts_when_they_are_used() -> None:
    loaded = f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    program = f"import sys, rlcs\n{loaded}\nrlcs.pack\n{loaded}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before == "" and "torch" in after


def test_every_name_is_there_and_documented() -> None:
    for name in rlcs.__all__:
        assert getattr(rlcs, name).__doc__, name
    assert set(rlcs.__all__) <= set(dir(rlcs))
    with pytest.raises(AttributeError, match="rlcs has no sampler"):
        rlcs.sampler  # noqa: B018


def test_problems_of_ones_own_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    (problem,) = rlcs.load_problems(str(path))
    assert problem.question == "1 + 1?" and problem.answer == "2"
    path.write_text('{"question": "1 + 1?"}\n', encoding="utf-8")
    with pytest.raises(rlcs.RlcsError, match="1 of 1 rows cannot be used"):
        rlcs.load_problems(str(path))
