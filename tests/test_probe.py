"""Which model SFT hands over: the rules by validation, and trials of RL with an exact continuation."""

import random
import shutil
from pathlib import Path

import pytest

from rlcs.data.run_data import load_run_data
from rlcs.evals.intervals import interval_of_mean, paired_interval
from rlcs.model import loading
from rlcs.pipeline import probe
from rlcs.pipeline.space import StageSpace, trials_space
from rlcs.pipeline.study import Study
from rlcs.plan.total import _rl
from rlcs.progress import Output
from rlcs.recipe.handover import losers_steps, rounds_of
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.stages import Grpo
from rlcs.recipe.table import summary_rows
from rlcs.signals import StopFlag
from rlcs.storage import read_json, read_jsonl, write_json
from rlcs.train.handover import choices, kept_steps, ranking
from rlcs.train.run_dir import RunDir

ODD = Path(__file__).with_name("odd_reward.py")


def row(step, right, *, samples=4, **more):
    accuracy = sum(right) / samples / len(right)
    return {"step": step, "n": len(right), "samples": samples, "right": right, "accuracy": accuracy, **more}


# --- rules by validation -------------------------------------------------------------------------


def test_each_rule_takes_the_largest_value_of_its_column_and_of_equals_the_earlier():
    values = {0: (0.9, 0.9, 0.9), 2: (0.1, 0.5, 0.5), 4: (0.4, 0.9, 0.7), 6: (0.4, 0.9, 0.2)}
    rows = {s: dict(zip(("accuracy", "pass_at_k", "signal"), v, strict=True)) for s, v in values.items()}
    assert choices(rows) == {"last": 6, "best_pass_1": 4, "best_pass_k": 4, "most_signal": 4}
    rows[2]["signal"] = 0.8
    assert choices(rows)["most_signal"] == 2
    assert ranking("best_pass_1", rows) == [4, 6, 2], "the model before the first step was not trained"
    assert ranking("last", rows) == ranking("probe", rows) == []
    assert kept_steps("probe", rows) == {2, 4} and kept_steps("best_pass_k", rows) == {4}
    assert kept_steps("last", rows) == set()
    greedy = {2: {"accuracy": 0.5, "pass_at_k": None, "signal": None}}
    assert choices(greedy) == {"last": 2, "best_pass_1": 2} and choices({0: greedy[2]}) == {}


def test_what_a_rule_takes_at_the_end_was_kept_when_it_was_measured():
    random.seed(3)
    for _ in range(50):
        rows = {}
        for step in range(0, 20, 2):
            rows[step] = {k: random.randint(0, 5) / 5 for k in ("accuracy", "pass_at_k", "signal")}
            kept = kept_steps("probe", rows)
            rows[step]["kept"] = step in kept
        assert all(rows[step]["kept"] for step in set(choices(rows).values()) - {18})


# --- successive halving --------------------------------------------------------------------------


def test_rounds_halve_and_the_losers_steps_are_their_sum():
    assert [rounds_of(n) for n in (1, 2, 3, 4, 5)] == [(), (2,), (3, 2), (4, 2), (5, 3, 2)]
    # Of 5: two go after one round, one after two, one after three, and the winner is not counted.
    assert losers_steps(5, 10) == 10 * (2 * 1 + 1 * 2 + 1 * 3)
    assert [losers_steps(n, 6) for n in (1, 2, 3, 4)] == [0, 6, 18, 24]


def test_trials_stand_by_accuracy_and_one_that_clearly_catches_up_before_the_best():
    def trial(before, after, n=60):
        return {0: row(0, before * n), 5: row(5, after * n)}

    high = trial([3, 4], [3, 4])
    low = trial([0, 1], [0, 2])
    order = probe.standings({10: low, 20: high}, 5)
    assert [s.step for s in order] == [20, 10] and order[0].behind[0] == 0 and order[1].behind[1] > 0
    assert order[1].slope[0] == pytest.approx(0.125 / 5), "points a step of RL"
    climbing = trial([0, 4], [3, 4])  # from 50% to what the other has had all the time
    climbing[5]["right"][0] = 2
    climbing[5]["accuracy"] -= 1 / 480
    order = probe.standings({10: climbing, 20: high}, 5)
    assert [s.step for s in order] == [10, 20] and order[0].catches_up and order[0].faster[1] > 0
    noisy = trial([3, 3], [2, 4])
    noisy[5]["right"][0] = 1
    noisy[5]["accuracy"] -= 1 / 480
    order = probe.standings({10: noisy, 20: trial([2, 4], [2, 4])}, 5)
    assert [s.step for s in order] == [20, 10], "a rise that is not clear counts nothing"
    even = probe.standings({10: high, 20: high}, 5)
    assert [s.step for s in even] == [10, 20], "of equals the earlier"


def test_the_interval_of_paired_differences():
    whole = [1, 1, 0, -1, 0, 0]
    assert interval_of_mean(whole) == paired_interval(2, 1, 6)
    low, high = interval_of_mean([0.25, 0.0, -0.25, 0.5] * 50)
    assert low < 0.125 < high and high - low == pytest.approx(2 * 1.96 * 0.28 / 202**0.5, rel=0.02)
    low, high = interval_of_mean([0.25] * 3)
    assert low < 0.25 < high, "three problems that move alike prove little"


def test_the_table_the_plan_and_the_space_count_the_trials():
    words = ["sft.handover.rule=probe", "validation.sft_every=50", "validation.samples=4"]
    recipe = load_recipe("quickstart", words).recipe
    assert dict(summary_rows(recipe))["SFT hand-over"] == (
        "short RL from the model that each rule takes, 6 steps a round; trials that lose take 24 of the 120 "
        "steps of RL at most"
    )
    plain = load_recipe("quickstart").recipe
    assert "SFT hand-over" not in dict(summary_rows(plain))
    seconds = {"eval": 2.0}
    tried, whole = (_rl(each, "sft_grpo", 10.0, seconds) for each in (recipe, plain))
    assert "at most 24 of them in trials that lose" in tried.note
    assert tried.hours - whole.hours == pytest.approx(10 * 200 * 4 * 2 / 3600), (
        "4, then 4 and 2 after a round"
    )
    arm = StageSpace(checkpoint=300, checkpoints=3, final=100)
    space = trials_space(arm, Grpo(save_every=4), recipe.sft.handover)
    assert (space.checkpoints, space.final) == (3 * 2, 3 * 100)


# --- a run ---------------------------------------------------------------------------------------

WORDS = [
    "data.cold_start=builtin:puzzles?count=30&seed=1",
    "data.rl=builtin:puzzles?count=30&seed=2",
    "data.test=builtin:puzzles?split=test&count=6&seed=3",
    "sft.epochs=2", "sft.batch_size=5", "sft.optimizer.lr=1e-3", "sft.keep_checkpoints=1",
    "grpo.steps=8", "grpo.prompts_per_step=3", "grpo.group_size=3", "grpo.max_new_tokens=8",
    "grpo.optimizer.lr=1e-3", f"grpo.reward.functions={{{ODD}:odd: 1}}", "grpo.reward.accuracy=0",
    "eval.max_new_tokens=8", "rollout.checks=0", "study.preflight=off",
    "sft.handover.rule=probe", "sft.handover.round_steps=1", "sft.handover.most_share=0.5",
    "validation.sft_every=2", "validation.samples=3", "validation.problems=6",
]  # fmt: skip


def study(folder, source, *more):
    recipe = load_recipe("quickstart", [*WORDS, f"model.name={source}", *more]).recipe
    data = load_run_data(recipe.study, recipe.data, decode_limit=10**7, validation=recipe.validation)
    Study(recipe, folder, data=data, output=Output(quiet=True), stop=StopFlag()).run()
    return folder


@pytest.fixture(scope="module")
def run(random_model_folder, tmp_path_factory):
    return study(tmp_path_factory.mktemp("runs") / "whole", random_model_folder)


def weights(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


def metrics(stage):
    return [{**row, "seconds": 0, "tokens_per_s": 0} for row in read_jsonl(stage / "metrics.jsonl")]


def test_the_winner_of_the_trials_goes_on_and_only_the_losers_cost(run):
    facts = read_json(run / "sft" / "candidates.json")
    candidates, chosen = facts["candidates"], facts["chosen"]
    assert candidates == sorted(set(facts["choices"].values())) and len(candidates) >= 2
    tried = [standing["step"] for standing in facts["rounds"][0]["standings"]]
    assert sorted(tried) == candidates and facts["rounds"][-1]["standings"][0]["step"] == chosen
    lost = losers_steps(len(candidates), 1)
    assert facts["steps"] == 8 - lost and facts["cost"]["steps"] == lost
    losers = [probe.trial_folder(run, step) for step in candidates if step != chosen]
    assert losers and sorted(run.glob("trial-*")) == sorted(losers)
    assert sum(len(read_jsonl(each / "metrics.jsonl")) for each in losers) == lost
    assert not any((each / "checkpoints").exists() for each in losers)
    rows = metrics(run / "sft_grpo")
    assert [row["step"] for row in rows] == list(range(1, facts["steps"] + 1))
    assert {row["steps"] for row in rows} == {facts["steps"]}, "the schedule ends where the training does"
    measured = [row["step"] for row in read_jsonl(run / "sft_grpo" / "validation.jsonl")]
    assert measured == [0, *(each["steps"] for each in facts["rounds"])]
    done = read_json(run / "sft" / "done.json")
    assert (done["step"], done["rule"]) == (chosen, "probe")
    assert facts["cost"]["trials_answers"] == 18 * (len(measured) + sum(
        len(read_jsonl(each / "validation.jsonl")) for each in losers))  # fmt: skip


def test_the_winner_s_training_is_that_of_a_run_that_never_paused(run, random_model_folder, tmp_path):
    """Bit for bit: the arm trained in one go from the model that was handed over, over as many steps."""
    whole = shutil.copytree(run, tmp_path / "run")
    for name in ("sft_grpo", "eval/sft_grpo", "eval/sft"):
        shutil.rmtree(whole / name)
    study(whole, random_model_folder)
    assert weights(whole / "sft_grpo") == weights(run / "sft_grpo")
    assert metrics(whole / "sft_grpo") == metrics(run / "sft_grpo")


def test_the_arm_sft_is_the_model_that_was_handed_over(run, random_model_folder, tmp_path):
    """Wherever it was in SFT: here the earliest candidate is made the winner."""
    other = shutil.copytree(run, tmp_path / "run")
    facts = read_json(other / "sft" / "candidates.json")
    early, last = min(facts["candidates"]), facts["choices"]["last"]
    moved = run / "sft" / "models" / f"step-{last:06d}" / "model.safetensors"
    after_last = weights(run / "sft") if facts["chosen"] == last else moved.read_bytes()
    at = Path(loading.resolve(f"{other}/sft@{early}"))
    expected = (at / "model.safetensors").read_bytes()
    write_json(other / "sft" / "candidates.json", {**facts, "chosen": early})
    for name in ("sft_grpo", "eval/sft_grpo", "eval/sft"):
        shutil.rmtree(other / name)
    study(other, random_model_folder)
    assert weights(other / "sft") == expected != after_last
    assert read_json(other / "sft" / "done.json")["step"] == early
    assert len(metrics(other / "sft_grpo")) == facts["steps"]


class Killed(BaseException):
    """Stands for a process that is gone."""


@pytest.mark.fault("kills", "a process gone behind a step, a trial, a round, a choice, a hand-over",
                   "the same command ends with the same weights and choice")  # fmt: skip
def test_killed_at_any_moment_it_ends_like_an_unbroken_one(
    run, random_model_folder, tmp_path, monkeypatch, request, record_property
):
    folder = tmp_path / "killed"

    def dying(target, name, calls):
        """The `calls`-th call of a function does its work, and then the process is gone."""
        left, real = [calls], getattr(target, name)

        def work(*args, **options):
            result = real(*args, **options)
            left[0] -= 1
            if not left[0]:
                raise Killed
            return result

        monkeypatch.setattr(target, name, work)

    moments = (
        (RunDir, "after_step", 9),  # in the first trial, before its checkpoint (SFT has 8 steps)
        (RunDir, "conclude", 1),  # behind a trial
        (RunDir, "conclude", 2),
        (probe, "write_json", 1),  # behind a round, before the losers are removed
        (RunDir, "after_step", 1),  # in the next round
        (probe, "_cost", 1),  # before the choice is written
        (probe, "_hand_over", 1),
        (RunDir, "after_step", 1),  # of what the winner goes on with
    )
    if not request.config.getoption("every_kill"):
        moments = moments[2:6:3]  # each costs a start of the study
    record_property("times", len(moments))
    happened = 0
    for target, name, calls in moments:
        with monkeypatch.context() as patch:
            monkeypatch = patch
            dying(target, name, calls)
            try:
                study(folder, random_model_folder)
            except Killed:
                happened += 1
    study(folder, random_model_folder)
    assert happened == len(moments)
    for stage in ("sft", "sft_grpo"):
        assert weights(folder / stage) == weights(run / stage)
        assert metrics(folder / stage) == metrics(run / stage)
    first, second = (read_json(each / "sft" / "candidates.json") for each in (run, folder))
    for facts in (first, second):
        facts["cost"] = {k: v for k, v in facts["cost"].items() if "seconds" not in k}
    assert first == second


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_hand_over_that_was_killed_is_finished(tmp_path, monkeypatch, moves):
    stage = tmp_path / "sft"
    for place, text in ((stage / "final", "last"), (stage / "models" / "step-000004", "early")):
        place.mkdir(parents=True)
        (place / "model").write_text(text)
    trial = probe.trial_folder(tmp_path, 4)
    trial.mkdir()
    write_json(stage / "done.json", {"step": 9, "rule": "probe", "seconds": 1.0})
    real, left = Path.replace, [moves]

    def replace(path, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", replace)
        probe._hand_over(tmp_path, 4)
    for _ in range(2):
        probe._hand_over(tmp_path, 4)
        assert (stage / "final" / "model").read_text() == "early"
        assert (stage / "models" / "step-000009" / "model").read_text() == "last"
        done = read_json(stage / "done.json")
        assert done.pop("files").keys() == {"final/model"}
        assert done == {"step": 4, "rule": "probe", "seconds": 1.0}
        assert (tmp_path / "sft_grpo").is_dir() and not trial.exists()
