"""The study of the cold start: its grid, what cells share, early stops, resuming, and what its page says."""

import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from conftest import SMALL_STUDY
from rlcs.cli.main import app
from rlcs.data.run_data import load_run_data
from rlcs.doctor.health import examine
from rlcs.errors import RecipeError, RunFolderError, UserError
from rlcs.pipeline import coldstart, study
from rlcs.pipeline.coldstart import ColdStart, cannot_win
from rlcs.pipeline.study import Study
from rlcs.progress import Output
from rlcs.recipe.arms import arms_override
from rlcs.recipe.coldstart import Wanted, chains_of, plan, prepared, study_words, subset
from rlcs.recipe.loading import load_recipe
from rlcs.records import Grade, GradedSample, Sample, StopReason, to_row
from rlcs.report import build
from rlcs.report.coldstart import lines
from rlcs.report.coldstart_results import read
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_json, write_json, write_jsonl
from rlcs.train.run_dir import RunDir

ODD = f"{Path(__file__).parent / 'odd_reward.py'}:odd"
TINY = [
    *SMALL_STUDY,
    "data.rl=builtin:puzzles?count=24&seed=2",
    "data.test=builtin:puzzles?split=test&count=10&seed=3",
    "sft.batch_size=2",
    "sft.save_every=1",
    "grpo.steps=2",
    "grpo.max_new_tokens=6",
    "grpo.save_every=1",
    f"grpo.reward={{accuracy: 0, functions: {{'{ODD}': 1}}}}",
    "eval.max_new_tokens=6",
    "validation.problems=6",
]
GRID = Wanted(demonstrations=(2, 4), epochs=(1.0, 2.0), seeds=1)


def recipe_of(*words: str, name: str = "quickstart"):
    return prepared(load_recipe(name, [*arms_override("coldstart"), *study_words(name, words)]).recipe)


# --- the grid


def test_cells_in_order_and_what_they_share():
    recipe = recipe_of("sft.batch_size=32", "sft.epochs=4", "seed=5")
    cells = plan(Wanted(seeds=2), recipe, {"distilled": 1400, "reflection": 1280})
    assert len(cells) == 2 * (1 + 2 * 3 * 2)
    first, second, *rest = cells
    assert first.name == "none-seed-5" and cells[13].name == "none-seed-6"
    # The most that all kinds have, twice the recipe's epochs: 8 * 1280 / 32.
    assert second.name == "distilled-1280-seed-5-steps-320"
    assert [c.steps for c in rest[:2]] == [160, 40] and {c.demonstrations for c in rest} == {0, 1280, 160}
    # One SFT for all lengths of a kind, a number and a seed.
    assert len({cell.sft for cell in cells if cell.chain != "none"}) == 2 * 2 * 2
    named = plan(Wanted(demonstrations=(50, 9999), epochs=(1, 1.01), seeds=1), recipe, {"given": 300})
    assert [(c.demonstrations, c.steps) for c in named] == [(0, 0), (300, 10), (50, 2)]


def test_the_recipe_of_the_study():
    recipe = recipe_of()
    assert recipe.grpo.steps == 30 and recipe.validation.grpo_every == 15
    assert recipe.sft.optimizer.schedule == "constant"
    own = recipe_of("grpo.steps=7", "sft.optimizer.schedule=cosine", "validation.problems=50")
    assert own.grpo.steps == 7 and own.validation.grpo_every == 4
    assert own.sft.optimizer.schedule == "cosine" and own.validation.problems == 50
    measured = recipe_of("validation.sft_every=2")
    assert measured.validation.demonstrations == 0, "else its SFT ends before the steps that cells begin with"


def test_a_smaller_choice_is_part_of_a_larger_one():
    rows = [{"id": str(index)} for index in range(40)]
    few, many, other = (subset(rows, count, seed) for count, seed in ((5, 0), (20, 0), (20, 1)))
    ids = [{row["id"] for row in each} for each in (few, many, other)]
    assert len(ids[0]) == 5 and ids[0] < ids[1] and ids[1] != ids[2]
    assert subset(rows, 40, 0) == rows


def test_kinds_of_demonstrations():
    recipe = recipe_of("teacher.chain=caption")
    assert chains_of(Wanted(), recipe, given=False) == ("caption",)
    assert chains_of(Wanted(), recipe, given=True) == ("given",)
    assert chains_of(Wanted(chains=("given", "reflection")), recipe, given=True) == ("given", "reflection")
    with pytest.raises(UserError, match="not all rows"):
        chains_of(Wanted(chains=("given",)), recipe, given=False)
    with pytest.raises(UserError, match="called 'captions'"):
        chains_of(Wanted(chains=("captions",)), recipe, given=False)


def test_when_a_cell_cannot_win():
    def right(share: float) -> list[float]:
        return [1.0] * round(200 * share) + [0.0] * round(200 * (1 - share))

    assert cannot_win(right(0.2), right(0.3), right(0.7))
    # Twice the gain reaches the best, so it may go on; without a gain it may not.
    assert not cannot_win(right(0.2), right(0.45), right(0.7))
    assert cannot_win(right(0.5), right(0.45), right(0.7))
    # As good as the best, and so few problems that nothing is known.
    assert not cannot_win(right(0.7), right(0.7), right(0.7))
    assert not cannot_win([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0])
    # Paired: nine problems lost and none won is below zero; 39 lost and 30 won, the same mean, is not.
    best = right(0.5)
    assert cannot_win(best, right(0.455), best)
    shuffled = random.Random(1).sample(right(0.455), 200)
    assert not cannot_win(best, shuffled, best)


# --- a real study on a random model


def study_in(folder: Path, model: Path, wanted: Wanted, *words: str, stop: StopFlag | None = None):
    recipe = recipe_of(*TINY, f"model.name={model}", "study.preflight=off", *words)
    data = load_run_data(recipe.study, recipe.data, decode_limit=10**8, validation=recipe.validation)
    output = Output(quiet=True)
    return ColdStart(recipe, wanted, folder, data=data, output=output, stop=stop or StopFlag())


def figures(result: dict) -> list[tuple]:
    """All of a result that the same command gives again."""
    keys = ("chain", "demonstrations", "sft_steps", "before_rl", "accuracy", "against_none", "ended")
    return [tuple(str(row[key]) for key in keys) for row in result["results"]]


@pytest.fixture(scope="module", autouse=True)
def _only_the_page_of_the_study():
    """Pages of single runs, which have tests of their own, are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.report, "build", lambda folder: folder)
        yield


@pytest.fixture(scope="module")
def finished(random_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that does not stop early, where the rule would stop every cell."""
    folder = tmp_path_factory.mktemp("coldstart") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coldstart, "cannot_win", lambda *shares: True)
        study_in(folder, random_model_folder, replace(GRID, early_stop=False)).run()
    return folder


def test_a_small_grid(finished: Path):
    result = read_json(finished / "coldstart.json")
    rows = [(row["demonstrations"], row["sft_steps"]) for row in result["results"]]
    assert rows == [(0, 0), (2, 1), (2, 2), (4, 2), (4, 4)] and result["over"] == result["cells"] == 5
    assert all(row["ended"] == {"0": "finished"} for row in result["results"])
    # One SFT for each number, with both lengths; the base and the longest SFT are measured once.
    assert sorted(path.name for path in (finished / "sft").iterdir()) == [
        "distilled-2-seed-0",
        "distilled-4-seed-0",
    ]
    metrics = (finished / "sft" / "distilled-4-seed-0" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 4
    kept = (finished / "sft" / "distilled-4-seed-0" / "cold_start" / "kept.jsonl").read_text().splitlines()
    assert len(kept) == 4
    cells = {path.name: path for path in (finished / "cells").iterdir()}
    logs = {name: (path / "logs" / "attempt-1.log").read_text() for name, path in cells.items()}
    assert "eval base: done" in logs["distilled-4-seed-0-steps-2"]
    assert "eval base: done" not in logs["distilled-4-seed-0-steps-4"]
    measured = [cells["none-seed-0"], finished / "sft" / "distilled-2-seed-0"]
    assert len({(each / "eval" / "base" / "predictions.jsonl").read_text() for each in measured}) == 1
    # Each cell is a run of its own, from the checkpoint that its recipe names.
    recipe = load_recipe(str(cells["distilled-4-seed-0-steps-2"] / "recipe.yaml")).recipe
    assert recipe.model.name == str(finished / "sft" / "distilled-4-seed-0" / "sft") + "@2"
    assert recipe.grpo.steps == 2 and not list(finished.rglob("*.safetensors"))
    assert (finished / "report" / "index.html").is_file()


def test_the_same_command_again_trains_nothing(finished: Path, random_model_folder: Path, monkeypatch):
    before = figures(read_json(finished / "coldstart.json"))
    monkeypatch.setattr(coldstart, "Study", None)
    assert figures(study_in(finished, random_model_folder, GRID).run()) == before
    with pytest.raises(RunFolderError, match="other lengths of SFT: 1,2 epochs"):
        study_in(finished, random_model_folder, Wanted(epochs=(3.0,), seeds=1)).run()
    with pytest.raises(RunFolderError, match=r"grpo\.steps was 2, is 3"):
        study_in(finished, random_model_folder, GRID, "grpo.steps=3")


class Killed(BaseException):
    """An end without any chance to save."""


def test_a_study_that_was_killed_goes_on(
    finished: Path, random_model_folder: Path, tmp_path: Path, monkeypatch
):
    """It is killed after every fifth training step and after some cells, and stopped once by a signal."""
    steps, after_step, finish = [], RunDir.after_step, ColdStart._finish

    def dies(self, *args, **options):
        after_step(self, *args, **options)
        steps.append(options["step"])
        if len(steps) % 5 == 0:
            raise Killed

    def dies_behind(self, cell, cells):
        if cell.steps == 2:
            raise Killed
        finish(self, cell, cells)

    monkeypatch.setattr(RunDir, "after_step", dies)
    monkeypatch.setattr(ColdStart, "_finish", dies_behind)
    stop, deaths, part = StopFlag(), 0, replace(GRID, demonstrations=(4,))
    stop.is_set = True
    with pytest.raises(Stopped):
        study_in(tmp_path / "study", random_model_folder, part, stop=stop).run()
    while True:
        try:
            result = study_in(tmp_path / "study", random_model_folder, part).run()
            break
        except Killed:
            deaths += 1
    assert deaths >= 3
    whole = {row[:5] for row in figures(read_json(finished / "coldstart.json"))}
    assert len(result["results"]) == 3 and {row[:5] for row in figures(result)} < whole


def test_a_cell_that_cannot_win_is_stopped_and_measured(
    random_model_folder: Path, tmp_path: Path, monkeypatch
):
    seen = []

    def never(start, middle, best):
        seen.append((len(start), len(middle), len(best)))
        return True

    monkeypatch.setattr(coldstart, "cannot_win", never)
    folder, wanted = tmp_path / "study", Wanted(demonstrations=(4,), epochs=(1.0,), seeds=1, keep_models=True)
    result = study_in(folder, random_model_folder, wanted).run()
    assert seen == [(6, 6, 6)]
    assert [row["ended"]["0"] for row in result["results"]] == ["finished", "stopped"]
    cell = folder / "cells" / "distilled-4-seed-0-steps-2"
    assert read_json(cell / "over.json")["step"] == 1
    assert len((cell / "grpo" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (cell / "stopped" / "eval" / "base" / "scores.json").is_file()
    assert any("were stopped in the middle of RL" in note for note in result["notes"])
    assert (folder / "cells" / "none-seed-0" / "grpo" / "final" / "config.json").is_file()


def test_a_cell_whose_rl_cannot_learn_counts_as_it_was(random_model_folder: Path, tmp_path: Path):
    words = ("grpo.reward={accuracy: 1, functions: {}}", "grpo.max_zero_variance_steps=1")
    wanted = Wanted(demonstrations=(2,), epochs=(1.0,), seeds=1)
    result = study_in(tmp_path / "study", random_model_folder, wanted, *words).run()
    assert [row["ended"]["0"] for row in result["results"]] == ["failed", "failed"]
    assert all(row["before_rl"] == row["accuracy"] for row in result["results"])
    assert any("did not learn" in note and "no group" in note for note in result["notes"])


# --- what the page says


def write_study(folder: Path, shares: dict[tuple[str, int, int], tuple[float, float, str]], seeds: int = 2):
    """A study's folder with so many right of 400, before and after RL; which ones differs by cell."""
    cells = []
    for (chain, count, steps), (before, after, how) in shares.items():
        for seed in range(seeds):
            name = f"{chain}-{count}-{steps}-{seed}"
            cells.append({
                "chain": chain, "demonstrations": count, "steps": steps, "epochs": steps / 10, "seed": seed,
                "folder": name, "sft": f"{chain}-{count}-seed-{seed}",
            })  # fmt: skip
            cell = folder / "cells" / name
            write_json(cell / "over.json", {"how": how, "why": "x"})
            end = "stopped/eval/base" if how == "stopped" else "eval/grpo"
            for place, share in (("eval/base", before), (end, after)):
                write_jsonl(cell / place / "predictions.jsonl", answers(share, seed))
            write_jsonl(
                cell / "grpo" / "metrics.jsonl", [{"step": 1, "seconds": {"rollout": 30.0, "update": 8.0}}]
            )
            done = {"seconds": 60.0, "optimizer_steps": 400}
            write_json(folder / "sft" / f"{chain}-{count}-seed-{seed}" / "sft" / "done.json", done)
    made = {"kept": 1200, "asked": 1600, "problems": 1600, "cost": None, "seconds": 3.0}
    command = ["rlcs", "coldstart", "mine.yaml", "--out", "a b"]
    facts = {
        "name": "mine",
        "command": command,
        "rl_steps": 40,
        "schedule": "constant",
        "warmup_steps": 20,
        "lengths": [1],
    }
    write_json(folder / "grid.json", facts | {"cells": cells, "demonstrations": {"distilled": made}})
    return folder


def answers(share: float, seed: int) -> list[dict]:
    """The first problems are the easy ones, so that differences between cells are paired."""
    rng = random.Random(f"{share}|{seed}")
    rows = []
    for index in range(400):
        correct = index + rng.uniform(-20, 20) < 400 * share
        sample = Sample(id=f"p{index}", text="x", stop=StopReason.EOS)
        rows.append(to_row(GradedSample(sample=sample, grade=Grade(reward=float(correct), correct=correct))))
    return rows


PAYS = {
    ("none", 0, 0): (0.2, 0.5, "finished"),
    ("distilled", 150, 40): (0.4, 0.5, "finished"),
    ("distilled", 600, 40): (0.5, 0.72, "finished"),
    ("distilled", 600, 160): (0.55, 0.73, "finished"),
    ("distilled", 1200, 80): (0.6, 0.735, "finished"),
    ("distilled", 1200, 320): (0.7, 0.6, "stopped"),
    ("reflection", 600, 160): (0.3, 0.51, "finished"),
    ("reflection", 1200, 320): (0.35, 0.55, "finished"),
}


def test_figures_of_a_study(tmp_path: Path):
    found = read(write_study(tmp_path, PAYS))
    by = {(r.chain, r.demonstrations, r.steps): r for r in found.cold}
    best = by["distilled", 1200, 80]
    assert found.none is not None and found.seeds == 2 and found.over == 16
    assert best.after == pytest.approx(0.735, abs=0.02) and best.before == pytest.approx(0.6, abs=0.02)
    assert best.sft_s == pytest.approx(60 * 80 / 400) and best.rl_s == 38.0
    gap = found.against_none(best)
    assert gap is not None and gap.clear and gap.low < gap.points < gap.high
    assert gap.points == pytest.approx(best.after - found.none.after)
    assert gap.by_seed == pytest.approx(
        [a - b for a, b in zip(best.by_seed, found.none.by_seed, strict=True)]
    )
    assert found.z == pytest.approx(2.690, abs=0.001)  # 0.05 / 2 / 7 in each tail
    assert by["distilled", 1200, 320].stopped == 2 and best.stopped == 0


def test_conclusions_of_a_study_in_which_it_pays(tmp_path: Path):
    build(write_study(tmp_path, PAYS))
    found = read_json(tmp_path / "coldstart.json")
    assert found["headline"] == "A cold start pays from 600 demonstrations on"
    text = "\n".join(found["notes"])
    assert "More than 600 demonstrations add nothing that the interval shows" in text
    assert re.search(r"On 1,200 demonstrations \(distilled\) a longer SFT hurts RL from 320 steps on", text)
    assert "although it is ahead before RL" in text
    assert "Of the kinds, distilled beats reflection" in text
    assert re.search(r"Against no cold start the best one is at \+\d\d\.\d points before RL", text)
    assert "distilled, 600 demonstrations, 40 steps, 6.0 s of SFT" in text
    assert "In a recipe: teacher.chain=distilled data.max_demonstrations=600 sft.epochs=4" in text
    assert "2 of 14 cells with a cold start were stopped" in text
    assert "one seed" not in text
    shown = "\n".join(lines(found))
    assert re.search(r"distilled +1,200 +320 +\d+\.\d% +\d+\.\d% .* stopped", shown)


def test_conclusions_of_a_study_in_which_it_does_not_pay(tmp_path: Path):
    none = {("none", 0, 0): (0.2, 0.5, "finished")}
    even = {**none, ("given", 100, 40): (0.3, 0.5, "finished"), ("given", 100, 10): (0.3, 0.49, "finished")}
    build(write_study(tmp_path / "even", even, seeds=1))
    found = read_json(tmp_path / "even" / "coldstart.json")
    assert found["headline"] == "No cold start that was tried pays measurably with this much RL"
    text = "\n".join(found["notes"])
    assert "There is one seed" in text and "make no difference after RL" in text
    assert "the best one is at" in text and "In a recipe" not in text
    build(write_study(tmp_path / "bad", {**none, ("given", 100, 40): (0.3, 0.3, "finished")}))
    assert (
        read_json(tmp_path / "bad" / "coldstart.json")["headline"]
        == "Every cold start that was tried costs accuracy"
    )
    build(write_study(tmp_path / "new", none))
    assert read_json(tmp_path / "new" / "coldstart.json")["headline"] == "Nothing to compare yet"


def test_the_page_shows_where_it_starts_to_pay(tmp_path: Path):
    page = build(write_study(tmp_path, PAYS)).read_text()
    for chart in ("by-number", "by-steps"):
        assert f'id="{chart}-figure_1"' in page
    assert page.count("<svg") == 2 and "no cold start, with its 95% interval" in page
    assert "all 7 comparisons together" in page and "In the middle of its RL a cell is measured" in page
    # Kinds have colours, the level without a cold start has a band, stopped points are hollow.
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert all(f"var(--{name})" in svg for name in ("p0", "p1", "base", "card"))
    assert re.search(r"<strong>\+2\d\.\d</strong>", page)
    assert "1,200 demonstrations of 1,600 problems, chosen among 1,600 answers" in page


def test_the_doctor_says_how_far_a_study_is(tmp_path: Path):
    write_study(tmp_path, PAYS)
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    state = examine(tmp_path)[0]
    assert state.message == "16 of 16 cells are over" and not state.fix
    (tmp_path / "cells" / "none-0-0-1" / "over.json").unlink()
    state = examine(tmp_path)[0]
    assert state.message == "15 of 16 cells are over"
    assert state.fix.endswith("rlcs coldstart mine.yaml --out 'a b'")


# --- the command


def test_mistakes_on_the_command_line():
    run = CliRunner()
    mistakes = {
        ("--demonstrations", "many"): "no list of whole numbers",
        ("--demonstrations", "0.5"): "no list of whole numbers",
        ("--epochs", "many"): "no list of numbers",
    }
    for words, message in mistakes.items():
        refused = run.invoke(app, ["coldstart", "quickstart", *words])
        assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output


def test_a_run_learns_from_at_most_so_many_demonstrations(tmp_path, monkeypatch):
    """Those of a cell with the same seed, so that a recipe repeats it."""
    monkeypatch.setattr("rlcs.pipeline.study.load_kept", lambda rows, folder: list(range(50)))

    def chosen(*words):
        recipe = load_recipe("quickstart", list(words)).recipe
        data = SimpleNamespace(cold_start=())
        return Study._demonstrations(SimpleNamespace(recipe=recipe, _data=data, folder=tmp_path))

    assert chosen() == chosen("data.max_demonstrations=99") == list(range(50))
    assert chosen("data.max_demonstrations=9", "seed=4") == subset(list(range(50)), 9, 4)


def test_commands_of_one_stage_name_the_command_that_tries_both():
    words = ["sft.handover.rule=probe", "validation.sft_every=5", "validation.samples=2"]
    done = CliRunner().invoke(app, ["sft", "quickstart", *words])
    assert isinstance(done.exception, RecipeError)
    assert done.exception.fix.startswith(f"rlcs run quickstart {' '.join(words)} does both")
