"""The sentences at the top of a report: what the intervals allow, and what a reader must know besides."""

import json
import shutil
from pathlib import Path

import pytest

from rlcs.records import NO_SIGNAL
from rlcs.report import build
from rlcs.report.conclusions import conclude
from rlcs.report.load_run import read_run, read_runs
from rlcs.report.validation import validation_curves
from test_report import Page, make_run, rows_of, write_rows


def set_right(run: Path, arm: str, right: int) -> None:
    """Give an arm `right` right answers: those to the first problems."""
    path = run / "eval" / arm / "predictions.jsonl"
    rows = rows_of(path)
    write_rows(path, [{**row, "correct": index < right} for index, row in enumerate(rows)])
    scores = json.loads((path.parent / "scores.json").read_text())
    (path.parent / "scores.json").write_text(json.dumps(scores | {"accuracy": right / len(rows)}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the arms that `rlcs run` measures, with 60 problems."""
    run = make_run(tmp_path_factory.mktemp("made") / "run", arms=("base", "sft", "sft_grpo"))
    for arm, right in (("base", 12), ("sft", 30), ("sft_grpo", 45)):
        set_right(run, arm, right)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def notes(run: Path, *, serious: bool = True) -> list[str]:
    return [note.text for note in conclude([read_run(run)]).notes if note.serious == serious]


def test_a_clear_difference_is_the_headline(run):
    found = conclude([read_run(run)])
    assert found.headline == "RL added 25.0 points: 50.0% → 75.0%"
    # Agresti and Min: 15 gained, none lost: (15.5 - 0.5) / 62 with 1.96 √(16 - 15² / 62) / 62 to either side
    assert found.lead == (
        "Cold start + RL against SFT only on the same 60 held-out problems. "
        "The 95% interval of the difference, +13.1 to +35.3 points, excludes zero."
    )
    page = Page(build(run).read_text())
    for words in ("The cold start (SFT) added 30.0 points: 20.0% → 50.0%",
                  "Cold start and RL together added 55.0 points: 20.0% → 75.0%"):  # fmt: skip
        assert words in page.text
    assert "RL only" not in page.text


def test_what_an_order_by_pass_rates_gains_is_stated_with_its_interval(run):
    path = run / "sft_grpo" / "metrics.jsonl"
    assert not any("pass rates" in note for note in notes(run, serious=False))
    rows = [
        row | {"signal_by_estimate": 0.7, "signal_shuffled": [0.2, 0.4][i % 2]}
        for i, row in enumerate(rows_of(path))
    ]
    write_rows(path, rows[: len(rows) // 2 * 2])
    half = 1.96 * (0.1**2 / (len(rows) // 2 * 2 - 1)) ** 0.5  # the standard error of as many halves
    [note] = [note for note in notes(run, serious=False) if "pass rates" in note]
    assert "70.0% of these groups had unequal rewards, against 30.0% of the groups in shuffled order" in note
    assert f"one in 8 (+40.0 points, 95% interval +{40 - 100 * half:.1f} to +{40 + 100 * half:.1f})" in note


def test_an_interval_with_zero_is_no_gain(run):
    set_right(run, "sft_grpo", 31)
    found = conclude([read_run(run)])
    assert found.headline == "RL added nothing measurable: 50.0% → 51.7%"
    assert "−2.8 to +6.1 points, includes zero" in found.lead


def test_a_clear_loss_is_named(run):
    set_right(run, "sft_grpo", 15)
    assert conclude([read_run(run)]).headline == "RL cost 25.0 points: 50.0% → 25.0%"


def test_one_arm_alone_says_nothing_about_training(run):
    for arm in ("base", "sft"):
        shutil.rmtree(run / "eval" / arm)
    (run / "summary.json").write_text(json.dumps({"name": "alone"}))
    found = conclude([read_run(run)])
    assert found.headline == "Cold start + RL: 75.0% of 60 held-out problems right"
    assert "does not tell what training added" in found.lead


def test_scores_without_answers_have_an_interval_of_independent_shares(run):
    for arm in ("base", "sft", "sft_grpo"):
        (run / "eval" / arm / "predictions.jsonl").unlink()
    found = conclude([read_run(run)])
    assert found.headline.startswith("RL added 25.0 points") and "on separate held-out problems" in found.lead


def test_seeds_that_disagree_found_nothing(run, tmp_path):
    for seed, right in ((0, 59), (1, 29)):
        shutil.copytree(run, tmp_path / "seeds" / f"seed-{seed}")
        set_right(tmp_path / "seeds" / f"seed-{seed}", "sft_grpo", right)
    found = conclude(read_runs(tmp_path / "seeds"))
    assert found.headline == "RL added nothing measurable: 50.0% → 73.3%"
    assert "excludes zero; the seeds disagree: +48.3, −1.7" in found.lead and "mean of 2 seeds" in found.lead
    set_right(tmp_path / "seeds" / "seed-1", "sft_grpo", 31)
    found = conclude(read_runs(tmp_path / "seeds"))
    assert found.headline == "RL added 25.0 points: 50.0% → 75.0%" and "by seed: +48.3, +1.7" in found.lead


def test_a_clean_run_has_no_notes(run):
    (run / "cold_start" / "stats.json").write_text(json.dumps({"kept": 100, "rejected": 0, "reasons": {}}))
    assert notes(run) == notes(run, serious=False) == []


def test_answers_without_end_or_verdict_are_told(run):
    path = run / "eval" / "sft" / "predictions.jsonl"
    rows = rows_of(path)
    for row in rows[:6]:
        row["stop"] = "length"
    rows[7] |= {"correct": None, "reward": None}
    write_rows(path, rows)
    cut, unscored = notes(run)
    assert (
        cut.startswith("Answers cut at the token limit: 10.0% of SFT only.") and "eval.max_new_tokens" in cut
    )
    assert unscored == "Answers that could not be scored, and count as wrong: 1 of SFT only."


def test_alarms_and_skipped_steps_are_told_with_what_to_do(run):
    path = run / "sft_grpo" / "metrics.jsonl"
    rows = [{**row, "boxes_per_answer": 1 + row["step"] / 40} for row in rows_of(path)]
    rows[3]["skipped"], rows[4]["skipped"] = "the loss is not finite", NO_SIGNAL
    write_rows(path, rows)
    boxes, skipped = notes(run)
    assert boxes.startswith(
        "Warning sign in RL after SFT: boxes per answer, 1.11 → 2.89 (limit 1.50). What to do: "
    )
    assert skipped == "RL after SFT: 1 of 80 steps were skipped (see Health)."


def test_demonstrations_that_are_wrong_or_left_out_are_told(run):
    stats = {"kept": 1338, "rejected": 465, "kept_wrong": 2, "reasons": {"repeats itself": 3, "wrong": 462}}
    (run / "cold_start" / "stats.json").write_text(json.dumps(stats))
    assert notes(run) == ["2 of the demonstrations that SFT learned from have a wrong answer: "
                          "teacher.keep=right leaves such ones out."]  # fmt: skip
    assert notes(run, serious=False) == [
        "SFT learned from 1,338 demonstrations; 465 others were left out: 462 wrong, 3 repeats itself."
    ]


@pytest.mark.parametrize("setting", ["warn", "drop"])
def test_overlap_of_training_and_test_data_is_told(run, setting):
    found = [{"role": "rl", "kind": "same problem", "rows": 1200, "first": [["a", "b"]]},
             {"role": "rl", "kind": "same question", "rows": 3},
             {"role": "cold_start", "kind": "near image", "rows": 9},
             {"role": "cold_start", "kind": "same image", "rows": 7}]  # fmt: skip
    (run / "data_checks.json").write_text(json.dumps({"overlap": {"setting": setting, "found": found}}))
    mild = notes(run, serious=False)
    assert mild[-1] == "With an image of the test data but another question: 7 rows of data.cold_start."
    if setting == "warn":
        assert notes(run)[0].startswith("Training and test data overlap: 1,203 rows of data.rl are also test")
    else:
        assert notes(run) == []
        assert "also in the test data: 1,203 rows of data.rl." in mild[-2]


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"overlap": 3}', '{"overlap": {"found": [1, {"rows": "x"}]}}', "{"]
)
def test_data_checks_of_another_form_say_nothing(run, content):
    (run / "data_checks.json").write_text(content)
    assert not [line for line in notes(run) if "overlap" in line]


def test_an_unfinished_and_a_stopped_run_say_where(run):
    (run / "summary.json").unlink()
    (run / "recipe.yaml").write_text("study:\n  arms: [base, sft, sft_grpo]\n")
    for stage in ("cold_start", "sft", "eval/base", "eval/sft"):
        (run / stage / "done.json").write_text("{}")
    rows = rows_of(run / "sft_grpo" / "metrics.jsonl")
    write_rows(run / "sft_grpo" / "metrics.jsonl", rows[:40])
    assert "This run is not finished (run, RL after SFT: 40 of 80): its numbers may change." in notes(
        run, serious=False
    )
    (run / "logs").mkdir()
    (run / "logs" / "attempt-1.log").write_text("x ERROR rlcs: ended by Stopped: as asked\n")
    assert notes(run)[0] == "The run stopped (run, RL after SFT: 40 of 80): Stopped: as asked"


def validation_row(step: int, accuracy: float, **more: object) -> dict[str, object]:
    return {"step": step, "n": 200, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05,
            "samples": 1, "pass_at_k": None, "mean_tokens": 90.0, "truncated": 0.0, **more}  # fmt: skip


def test_a_peak_well_before_the_end_is_told(run):
    rows = [validation_row(s, a) for s, a in ((0, 0.5), (20, 0.6), (40, 0.72), (60, 0.7), (80, 0.65))]
    write_rows(run / "sft_grpo" / "validation.jsonl", rows)
    told = "RL after SFT was best on the validation problems at step 40 of 80: 72.0%, at the end 65.0%. "
    assert notes(run) == [told + "The last weights were kept; grpo.keep=best would keep the best."]
    (run / "sft_grpo" / "done.json").write_text('{"step": 40, "rule": "best_pass_1"}')
    assert notes(run) == [] and told + "The weights of step 40 were kept." in notes(run, serious=False)
    write_rows(run / "sft_grpo" / "validation.jsonl", [*rows[:3], validation_row(80, 0.715)])
    last = notes(run, serious=False)[-1]
    assert last.endswith("at the end 71.5%, which is within the interval. The weights of step 40 were kept.")
    (run / "sft_grpo" / "done.json").write_text('{"step": 80, "rule": "last"}')
    assert not [line for line in notes(run, serious=False) if "best" in line], "within a point of the best"
    write_rows(run / "sft_grpo" / "validation.jsonl", [*rows[:3], validation_row(80, 0.70)])
    assert notes(run) == [] and "within the interval. The last weights" in notes(run, serious=False)[-1]


def test_validation_is_a_chart_with_band_pass_at_k_and_the_kept_step(run):
    rows = [validation_row(s, 0.5 + s / 400, samples=8, pass_at_k=0.8) for s in range(0, 81, 20)]
    write_rows(run / "sft_grpo" / "validation.jsonl", [*rows, {"step": "x"}])
    write_rows(run / "sft" / "validation.jsonl", [validation_row(s, 0.3) for s in (0, 80)])
    (run / "sft_grpo" / "done.json").write_text('{"step": 60, "rule": "best_pass_1"}')
    html = build(run).read_text()
    page = Page(html)
    titles = ["Reward", "Accuracy on training problems", "Response length, tokens",
              "Validation accuracy, RL after SFT; dashed: pass@8"]  # fmt: skip
    assert [html.index(f"<figcaption>{title}</figcaption>") for title in titles] == sorted(
        html.index(f"<figcaption>{title}</figcaption>") for title in titles
    )
    assert "Validation accuracy, SFT</figcaption>" in html and "kept: step 60" in page.text
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    (label,) = [
        each for each in labels if "200 validation" in each and "step 20" not in each and "70.0%" in each
    ]
    assert "from 50.0% at step 0 to 70.0% at step 80, best 70.0% at step 80" in label
    assert "a ring marks the step whose weights were kept" in page.text


def test_what_sft_could_hand_over_is_a_table_with_rules_trials_and_cost(run):
    shares = {"signal": 0.4, "entropy": 0.25, "distinct": 2.0, "alike": 0.5, "format": 1.0, "loss": None}
    rows = [validation_row(s, s / 100, samples=4, pass_at_k=0.9 - s / 200, **shares) for s in (0, 20, 40)]
    rows[1]["entropy"] = 0.125
    write_rows(run / "sft" / "validation.jsonl", rows)
    (run / "sft" / "done.json").write_text('{"step": 20, "rule": "probe"}')
    standings = [{"step": 20, "accuracy": 0.5, "slope": [0.02, -0.01, 0.05]}, "torn", {"step": 40}]
    facts = {"why": "it rose", "rounds": [{"steps": 6, "standings": standings}, None]}
    facts["cost"] = {"steps": 6, "share": 0.06, "sft_answers": 600, "trials_seconds": 9}
    (run / "sft" / "candidates.json").write_text(json.dumps(facts))
    page = Page(build(run).read_text())
    text = " ".join(page.text.split())
    assert "20, handed over 20.0%80.0%40.0% best" in text
    assert "best_pass_k, most_signal 6 steps: 50.0%, +2.00 (−1.00 to +5.00)" in text
    assert "40 40.0%70.0%" in text and "last, best_pass_1" in text
    assert "Rule: probe. It rose. The losers took 6 steps of RL (6%); to measure, 600 answers" in text
    assert "Validation: entropy of answers, nats a token" in page.text
    (run / "sft" / "candidates.json").write_text("[1]")
    (run / "sft" / "done.json").write_text("{}")
    text = " ".join(Page(build(run).read_text()).text.split())
    assert "handed over" not in text and "Trial of RL" not in text and "best_pass_k, most_signal" in text


def test_validation_over_seeds_is_the_mean_where_all_have_a_step(run, tmp_path):
    for seed, accuracy in ((0, 0.4), (1, 0.6)):
        folder = shutil.copytree(run, tmp_path / "seeds" / f"seed-{seed}")
        rows = [validation_row(step, accuracy) for step in (0, 10, 20)[: 3 - seed]]
        write_rows(folder / "sft" / "validation.jsonl", rows)
    (curve,) = validation_curves(read_runs(tmp_path / "seeds"))
    assert [(p.step, p.accuracy, p.low, p.high) for p in curve.points] == [
        (0, 0.5, 0.4, 0.6),
        (10, 0.5, 0.4, 0.6),
    ]
