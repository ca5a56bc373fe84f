"""`rlcs doctor RUN --replay`: a real collapse of the built-in model, and the change that prevents it."""

import json

import pytest

from conftest import rlcs
from rlcs.data.run_data import RunData
from rlcs.doctor.health import examine
from rlcs.errors import UserError
from rlcs.pipeline import replay
from rlcs.pipeline.replay import Collapse, Replay, changes, find_collapse
from rlcs.progress import Output
from rlcs.recipe.loading import load_recipe
from rlcs.records import to_row
from rlcs.signals import StopFlag
from rlcs.storage import read_json, write_json
from rlcs.train import collapse
from rlcs.train.collapse import Crossing
from rlcs.train.earlier import EarlierAnswers

SHORT = (
    "data.rl=builtin:puzzles?count=40&seed=2&levels=1", "data.test=builtin:puzzles?split=test&count=2&seed=3",
    "study.preflight=off", "grpo.steps=12", "grpo.prompts_per_step=3", "grpo.group_size=4",
    "grpo.max_new_tokens=48", "grpo.save_every=2", "grpo.optimizer.lr=2e-2", "grpo.optimizer.warmup_steps=14",
    "eval.max_new_tokens=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of RL from the built-in model with a learning rate that is much too high."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "LEAD", 4)  # so that a checkpoint counts
        done = rlcs("grpo", "quickstart", "--quiet", "--out", folder, *SHORT)
    assert done.returncode == 0 and "finds out what prevents it" in done.stdout + done.stderr, done
    return folder


def test_the_unchanged_replay_collapses_and_the_right_change_prevents_it(run, monkeypatch):
    def few(recipe, crossing):
        named = {change.name: change for change in changes(recipe, crossing)}
        return [named["learning rate a tenth"], named["old logprobs by the policy"]]

    crossing = read_json(min(run.glob("grpo/collapse/*/crossing.json")))
    assert crossing["checkpoint"] == crossing["step"] - 4 > 0
    [before] = [finding for finding in examine(run) if "collapse" in finding.name][:1]
    assert "--replay" in before.fix and crossing["name"] in before.message
    files = sorted(path for path in run.rglob("*"))

    drafted_from, logged = [], EarlierAnswers._logged

    def noted(self, folder, step):
        drafted_from.append((folder.parent.parent.parent, logged(self, folder, step)))
        return drafted_from[-1][1]

    monkeypatch.setattr(EarlierAnswers, "_logged", noted)
    monkeypatch.setattr(replay, "changes", few)
    done = rlcs("doctor", run, "--replay")
    assert done.returncode == 0, done
    assert len(drafted_from) == 3 and all(at == run and answers for at, answers in drafted_from)
    result = read_json(run / "grpo" / "collapse" / f"step-{crossing['step']:06d}" / "replay.json")
    unchanged, tenth, policy = result["outcomes"]
    assert result["repeats"] and not unchanged["held"]
    metrics = [json.loads(line) for line in (run / "grpo" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in metrics if row["step"] <= result["last_step"]]
    assert unchanged["value"] == collapse.last_mean(rows, crossing["key"]), "step by step as it was"
    assert tenth["held"] and not tenth["other"] and not policy["held"]
    assert [fix["words"] for fix in result["fixes"]] == [["grpo.optimizer.lr=0.002"]]
    assert (
        "learning rate a tenth prevents it: grpo.optimizer.lr=0.002" in done.stdout
        and "(reward " in done.stdout
    )
    [after] = [finding for finding in examine(run) if "collapse" in finding.name][:1]
    assert after.fix == "grpo.optimizer.lr=0.002"
    left = set(run.rglob("*")) - set(files)
    assert [path.name for path in left] == ["replay.json"], "nothing else is left"


@pytest.mark.parametrize(
    ("words", "key", "named", "not_named"),
    [
        (("grpo.optimizer_steps=1",), "kl", ("learning rate halved", "KL penalty on", "temperature 0.8"),
         ("half the clip range", "old logprobs by the policy", "reward without format", "entropy control")),
        (("grpo.optimizer_steps=2", "grpo.reward.format=0.5", "grpo.temperature=0.7"), "kl",
         ("half the clip range", "old logprobs by the policy", "reward without format", "temperature 1"), ()),
        (("grpo.reward.functions={FILE:half: 0.5}", "grpo.reward.length=0.1"), "boxes_per_answer",
         ("reward without half", "reward without length"), ()),
        (("grpo.kl.kind=k3", "grpo.kl.coefficient=0.01"), "entropy",
         ("five times the KL penalty", "entropy control", "temperature 1.2"), ("KL penalty on",)),
        ((), "truncated", ("cut answers not learnt from",), ()),
        (("rollout.engine=vllm_server", "rollout.importance_cap=null"), "sampler_gap",
         ("importance weights",), ()),
    ],
)  # fmt: skip
def test_the_changes_that_apply_are_tried_and_each_is_a_recipe(tmp_path, words, key, named, not_named):
    (tmp_path / "own.py").write_text("def half(problem, response):\n    return 0.5\n")
    words = [word.replace("FILE", str(tmp_path / "own.py")) for word in words]
    recipe = load_recipe("quickstart", words).recipe
    crossing = Crossing(step=9, key=key, name="Sign", form="{:.2f}", value=2.0, limit=1.5)
    found = {change.name: change for change in changes(recipe, crossing)}
    assert set(named) <= set(found) and not set(not_named) & set(found)
    for change in found.values():
        assert load_recipe("quickstart", [*words, *change.words]).recipe != recipe, change.name


def test_a_replay_ends_with_the_arm_of_which_trials_have_taken_steps(tmp_path):
    words = ["sft.handover.rule=probe", "validation.sft_every=5", "validation.samples=2"]
    recipe = load_recipe("quickstart", words).recipe
    write_json(tmp_path / "recipe.yaml", recipe.model_dump(mode="json"))  # JSON is YAML, too
    write_json(tmp_path / "sft" / "candidates.json", {"steps": 96})
    crossing = Crossing(step=94, key="kl", name="KL", form="{:.2f}", value=2.0, limit=1.5)
    last = {
        arm: Replay(
            Collapse(run=tmp_path, arm=arm, crossing=crossing),
            RunData(cold_start=(), rl=(), test=()),
            output=Output(quiet=True),
            stop=StopFlag(),
        ).last
        for arm in ("sft_grpo", "grpo")
    }
    assert last == {"sft_grpo": 96, "grpo": 99}


def test_the_collapse_of_a_trial_that_lost_is_found_with_where_to_look(tmp_path):
    kept = tmp_path / "trial-000126" / "collapse" / "step-000009"
    kept.mkdir(parents=True)
    crossing = Crossing(step=9, key="kl", name="KL", form="{:.2f}", value=2.0, limit=1.5)
    (kept / "crossing.json").write_text(json.dumps(to_row(crossing)))
    with pytest.raises(UserError) as caught:
        find_collapse(tmp_path)
    assert "from step 126 of SFT, collapsed (in step 9: KL: 2.00 over the last 5 steps" in caught.value.what
    assert str(kept / "batch.jsonl") in caught.value.fix


def test_a_run_without_a_collapse_and_no_run_are_refused_in_words(tmp_path):
    done = rlcs("doctor", tmp_path, "--replay")
    assert done.returncode == 2 and "nothing to replay" in done.stderr
    kept = tmp_path / "grpo" / "collapse" / "step-000009"
    kept.mkdir(parents=True)
    crossing = Crossing(step=9, key="kl", name="KL", form="{:.2f}", value=2.0, limit=1.5)
    (kept / "crossing.json").write_text(json.dumps(to_row(crossing)))
    assert find_collapse(tmp_path, 9).crossing == find_collapse(tmp_path).crossing == crossing
    done = rlcs("doctor", tmp_path, "--replay", "--step", 8)
    assert done.returncode == 2 and "in step 8 of this run" in done.stderr
    done = rlcs("doctor", "--replay")
    assert done.returncode == 2 and "rlcs doctor RUN --replay" in done.stderr
    done = rlcs("doctor", tmp_path, "--step", 9)
    assert done.returncode == 2 and "add --replay" in done.stderr
