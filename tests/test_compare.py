"""Two runs side by side: numbers worked out by hand, what is paired and what is not, terminal, JSON, page."""

import json
import math
import random
import shutil

import pytest
from typer.testing import CliRunner

from rlcs.cli.main import app
from rlcs.errors import RunFolderError
from rlcs.evals.intervals import mcnemar
from rlcs.report.compare import compare, write_html
from test_report import Page, make_arm, make_run, rows_of, write_rows


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs on the same 60 problems; the second with another recipe and eight more right answers."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = make_run(folder / "a", arms=("base", "sft_grpo")), folder / "b"
    shutil.copytree(first, second)
    recipe = (second / "recipe.yaml").read_text()
    (second / "recipe.yaml").write_text(
        recipe.replace("clip_high: 0.3", "clip_high: 0.4\n  kl:\n    kind: k3")
    )
    path = second / "eval" / "sft_grpo" / "predictions.jsonl"
    rows = rows_of(path)
    right = [row for row in rows if row["correct"]]
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong[:10]:
        row["correct"] = True
    for row in right[:2]:
        row["correct"] = False
    write_rows(path, rows)
    scores = {"accuracy": (len(right) + 8) / 60, "n": 60}
    (second / "eval" / "sft_grpo" / "scores.json").write_text(json.dumps(scores))
    return first, second


def test_same_problems_are_paired(pair):
    found, _ = compare(*pair)
    base, best = found.gaps
    assert (base.points, base.gained, base.lost, base.shared, base.p) == (0, 0, 0, 60, 1.0)
    assert (best.gained, best.lost, best.shared) == (10, 2, 60)
    assert best.points == pytest.approx(8 / 60)
    middle, half = 8 / 62, 1.96 * math.sqrt(13 - 64 / 62) / 62  # Agresti and Min: (b - c) / (n + 2)
    assert (best.low, best.high) == pytest.approx((middle - half, middle + half))
    assert best.p == pytest.approx(2 * (1 + 12 + 66) / 4096)


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(300, 500) < 1e-11


def test_the_same_id_with_another_question_is_not_paired(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    path = other / "eval" / "problems.jsonl"
    write_rows(path, [{**row, "question": "another"} for row in rows_of(path)])
    gap = compare(pair[0], other)[0].gaps[1]
    assert (gap.shared, gap.gained, gap.lost, gap.p) == (0, 0, 0, None)
    assert gap.points == pytest.approx(8 / 60)
    paired = compare(*pair)[0].gaps[1]
    assert gap.high - gap.low > 1.2 * (paired.high - paired.low), "pairing is what makes it narrow"


def test_newcombe_interval_of_independent_shares(pair, tmp_path):
    """The example of Newcombe (1998), table II: 56/70 against 48/80 is 0.2 with 0.0524 to 0.3339."""
    runs = []
    for name, right, n in (("x", 48, 80), ("y", 56, 70)):
        folder = tmp_path / name / "eval" / "base"
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps({"accuracy": right / n, "n": n}))
        runs.append(tmp_path / name)
    gap = compare(*runs)[0].gaps[0]
    assert (gap.points, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-3)


def test_recipes_seconds_and_last_steps(pair):
    found, _ = compare(*pair)
    assert found.recipe == {"grpo.clip_high": (0.3, 0.4), "grpo.kl.kind": (None, "k3")}
    assert found.seconds["sft"] == (76.0, 76.0)
    assert found.ends["RL after SFT reward"][0] == pytest.approx(found.ends["RL after SFT reward"][1])


def test_seeds_are_averaged_before_they_are_compared(tmp_path):
    for side in ("a", "b"):
        for seed in (0, 1):
            make_run(tmp_path / side / f"seed-{seed}", arms=("base",), seed=seed)
    held_out = rows_of(tmp_path / "b" / "seed-1" / "eval" / "problems.jsonl")
    make_arm(tmp_path / "b" / "seed-1" / "eval" / "base", "sft_grpo", held_out, random.Random(3))
    gap = compare(tmp_path / "a", tmp_path / "b")[0].gaps[0]
    assert gap.shared == 60 and gap.p is None and gap.points > 0
    changes = gap.gained + gap.lost
    assert gap.points == pytest.approx((gap.gained - gap.lost) / 2 / 60), "one seed of two moved: half each"
    spread = math.sqrt((changes / 4 - 60 * gap.points**2) / 59)
    assert gap.high - gap.points == pytest.approx(1.96 * spread / math.sqrt(60))


def test_terminal_json_and_page(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "compare.html"
    shown = CliRunner().invoke(app, ["compare", *map(str, pair), "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    for words in ("+13.3 [", "+10 −2 of 60", "0.039", "grpo.clip_high", "0.4", "RL after SFT reward"):
        assert words in shown.output, words
    assert max(map(len, shown.output.splitlines()[:-1])) <= 80
    told = json.loads(CliRunner().invoke(app, ["compare", *map(str, pair), "--json"]).output)
    assert told["gaps"][1]["gained"] == 10 and told["recipe"]["grpo.clip_high"] == [0.3, 0.4]
    html = Page(page.read_text())
    assert html.open == [] and not {"script", "link"} & set(html.tags)
    assert html.tags.count("svg") == 5 and "+13.3" in html.text and "10" in html.text


def test_hostile_recipes_and_empty_folders(pair, tmp_path):
    with pytest.raises(RunFolderError, match="no run is here"):
        compare(pair[0], tmp_path)
    (tmp_path / "recipe.yaml").write_text('name: "<script>alert(1)</script>"\n')
    found, sides = compare(pair[0], tmp_path)
    assert found.gaps == ()
    write_html(tmp_path / "page.html", found, sides)
    assert "script" not in Page((tmp_path / "page.html").read_text()).tags
