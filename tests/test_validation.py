"""Measuring while a stage trains: what is measured when, resume, the best checkpoint, untouched training."""

import json
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from conftest import SMALL_STUDY, LengthGrader, Stopper, make_problem
from rlcs.data import puzzles
from rlcs.data.run_data import hold_out, load_run_data
from rlcs.engines.local import LocalEngine
from rlcs.errors import DataError, RecipeError, RunFolderError
from rlcs.evals.arms import Evaluator
from rlcs.evals.scores import pass_at
from rlcs.evals.validation import Answer, scores, validate
from rlcs.generation import EngineSampler
from rlcs.grading.reward import WeightedSum
from rlcs.model.checkpoints import complete
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.pipeline import run_folder
from rlcs.progress import screen
from rlcs.recipe.execution import Trackers
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Validation as Settings
from rlcs.recipe.stages import Grpo, Optimizer, Sft
from rlcs.recipe.table import summary_rows
from rlcs.records import Demonstration, Grade, Request, Sample, StopReason
from rlcs.records.trees import Branch, Tree
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_json, read_jsonl
from rlcs.train import grpo, sft
from rlcs.train.checkpoint import Checkpoints
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir
from rlcs.train.trackers import Trackers as RunTrackers
from rlcs.train.validation import Validation
from test_train import assert_equal_weights, fresh, rows_of, weights_of

SFT = {"batch_size": 4, "epochs": 2, "save_every": 2, "optimizer": Optimizer(lr=1e-3)}
GRPO = {
    "steps": 4, "prompts_per_step": 4, "group_size": 3, "max_new_tokens": 8, "save_every": 2,
    "optimizer": {"lr": 1e-3},
}  # fmt: skip
KEYS = {
    "step", "n", "accuracy", "low", "high", "samples", "pass_at_k", "signal", "entropy", "distinct", "alike",
    "format", "mean_tokens", "truncated", "unscored", "right", "seconds",
}  # fmt: skip


class Scripted:
    """Measurements with given accuracies, in order; `stop_in` is the number of one that is interrupted."""

    def __init__(self, accuracies, stop_in=None):
        self.accuracies, self.stop_in, self.calls = accuracies, stop_in, 0

    def __call__(self, stop):
        self.calls += 1
        if self.calls == self.stop_in:
            stop.is_set = True
            stop.check("validation")
        accuracy = self.accuracies.pop(0) if self.accuracies else 0.0
        row = {"n": 10, "accuracy": accuracy, "low": 0.0, "high": 1.0, "samples": 1, "pass_at_k": None}
        return row | {"mean_tokens": 3.0, "truncated": 0.0, "unscored": 0, "seconds": 0.1}


def measured_by(vlm, chat, *, samples=1, grader=None):
    """A real measurement of a few problems, as a run makes it."""
    engine = LocalEngine(vlm, chat, max_rows=8)
    sampling = Settings(sft_every=1, samples=samples).sampling(max_new_tokens=8, seed=0)
    sampler = EngineSampler(engine, chat, sampling, batch_size=64)
    evaluator = Evaluator(sampler=sampler, grader=grader or LengthGrader())
    problems = puzzles.load("puzzles", split="train", count=5, seed=9)
    return lambda stop: validate(evaluator, problems, samples=samples, stop=stop)


@pytest.fixture(scope="module")
def demonstrations():
    problems = puzzles.load("puzzles", split="train", count=12, seed=5)
    return [
        Demonstration(problem=p, response=puzzles.teach(p, seed=0, wrong_share=0.0), teacher="builtin")
        for p in problems
    ]


def train(kind, source, folder, demonstrations, *, measure=None, stop_at=None, trackers=None, **more):
    """Train a stage of 6 (SFT) or 4 (GRPO) steps; `measure` is a measurement, or makes one of (vlm, chat)."""
    vlm, chat = fresh(source)
    settings = Sft(**SFT | more) if kind == "sft" else Grpo(**GRPO | more)
    options = {} if trackers is None else {"trackers": trackers}
    stage = RunDir(folder, name=kind, seed=3, settings=settings, recipe_hash="h", **options)
    if measure is not None:
        measure = measure if isinstance(measure, Scripted) else measure(vlm, chat)
        stage.validation = Validation(every=2, measure=measure)
    with StopFlag() as stop, screen(kind, 6, quiet=True) as view:
        view = Stopper(view, stop, stop_at) if stop_at else view
        if kind == "sft":
            sft.train(vlm, chat, demonstrations, settings, run=stage, screen=view, stop=stop)
        else:
            problems = puzzles.load("puzzles", split="train", count=10, seed=5)
            engine = LocalEngine(vlm, chat, max_rows=8)
            context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=engine, grader=LengthGrader())
            grpo.train(context, problems, settings, run=stage, screen=view, stop=stop)
    return weights_of(vlm)


def keeping_best(kind):
    return {"handover": {"rule": "best_pass_1"}} if kind == "sft" else {"keep": "best"}


def measured(folder):
    return [row["step"] for row in read_jsonl(folder / "validation.jsonl")]


def kept(folder):
    return sorted(complete(folder / "checkpoints"))


# --- a measurement ---------------------------------------------------------------------------------


def test_pass_at_k_is_the_mean_over_all_draws():
    """Against the definition: the share of all sets of k out of n answers that hold a right one."""
    for n, right, k in ((5, 2, 3), (4, 0, 2), (6, 5, 2), (3, 3, 3), (8, 1, 8)):
        draws = list(combinations([True] * right + [False] * (n - right), k))
        assert math.isclose(pass_at(n, right, k), sum(map(any, draws)) / len(draws))


def test_a_row_holds_what_was_measured(vlm, chat):
    greedy = measured_by(vlm, chat)(StopFlag())
    assert greedy.keys() == KEYS - {"step"} and (greedy["n"], greedy["samples"]) == (5, 1)
    assert greedy["pass_at_k"] is None and greedy["low"] <= greedy["accuracy"] <= greedy["high"]
    several = measured_by(vlm, chat, samples=4)(StopFlag())
    assert several["accuracy"] * 20 == pytest.approx(round(several["accuracy"] * 20))
    assert several["accuracy"] <= several["pass_at_k"] <= 1 and several["samples"] == 4
    assert several["pass_at_k"] * 5 == pytest.approx(round(several["pass_at_k"] * 5))
    again = measured_by(vlm, chat, samples=4)(StopFlag())
    assert {**again, "seconds": 0} == {**several, "seconds": 0}, "the same weights, the same answers"


def test_an_answer_that_is_not_scored_is_not_right_and_counted(vlm, chat):
    class Silent:
        def grade(self, answers):
            return [Grade(reward=None, correct=None, why="timed out") for _ in answers]

    row = measured_by(vlm, chat, samples=2, grader=Silent())(StopFlag())
    assert (row["accuracy"], row["pass_at_k"], row["unscored"]) == (0.0, 0.0, 10)


def test_the_measures_of_several_answers_are_those_of_their_definitions(vlm, chat):
    """Against plain counts over made answers; entropy against the engine's own logprobs."""

    def made(text, correct, logprob, tokens):
        sample = Sample(id="a", text=text, stop=StopReason.EOS, tokens=tokens)
        return Answer(sample=sample, grade=Grade(reward=1.0, correct=correct), logprob=logprob)

    one = [made("a b c d so \\boxed{1}", True, -2.0, 4), made("a b c e so \\boxed{2}", False, -1.0, 2)]
    two = [made("x \\boxed{1}", True, -3.0, 3), made("x \\boxed{1}", True, -3.0, 3)]
    row = scores([make_problem("a"), make_problem("b")], [one, two])
    assert (row["accuracy"], row["pass_at_k"], row["right"]) == (0.75, 1.0, [1, 2])
    assert row["signal"] == 0.5, "the second group is right both times"
    assert row["entropy"] == pytest.approx(9 / 12), "over tokens, not over answers"
    assert row["distinct"] == 1.5 and row["format"] == 1.0
    assert row["alike"] == pytest.approx((1 / 7 + 1) / 2), "one of seven runs of three words is in both"
    broken = [made("no box", False, -1.0, 1), made("\\boxed{1}", False, -1.0, 1)]
    assert scores([make_problem("a")], [broken])["format"] == 0.5
    assert scores([make_problem("a")], [broken[:1]])["entropy"] is None, "a greedy answer is not drawn"
    engine = LocalEngine(vlm, chat, max_rows=8)
    sampler = EngineSampler(engine, chat, chat.sampling(n=2, max_new_tokens=4, seed=0), batch_size=4)
    requests = [Request.of(make_problem("a"), index=index) for index in range(2)]
    drawn = {sample.index: rollout for sample, rollout in sampler.drawn(requests)}
    [(first, second)] = engine.sample(chat.prompts([make_problem("a")]), sampler._sampling)
    assert (drawn[0].logprobs, drawn[1].logprobs) == (first.logprobs, second.logprobs)
    assert drawn[0].logprobs != drawn[1].logprobs


def test_demonstrations_are_held_out_by_problem_and_their_loss_is_that_of_each_alone(
    vlm, chat, demonstrations
):
    twice = [*demonstrations, replace(demonstrations[-1], response="another")]
    learnt, held = sft.hold_out(twice, 5)
    assert held == twice[-2:] and learnt == twice[:-2], "a tenth of 12 problems is one, with both its answers"
    assert sft.hold_out(twice, 0) == (twice, [])
    total, count = 0.0, 0
    for each in held:
        prompt, ids = chat.prompt(each.problem), chat.response_ids(each.response)
        tree = Tree(prompt=prompt, branches=(Branch(ids=ids, weights=(1.0,) * len(ids)),))
        with torch.no_grad():
            total -= score(vlm, pack([tree], chat.patches)).logprobs.sum().item()
        count += len(ids)
    assert sft.loss_on(held, vlm, chat, Sft()) == pytest.approx(total / count, rel=1e-5)
    assert sft.loss_on([], vlm, chat, Sft()) is None


def test_the_part_that_decides_is_asked_alone():
    class Refusing:
        def grade(self, answers):
            raise AssertionError("it is not asked")

    whole = WeightedSum(graders={"own": LengthGrader(), "judge": Refusing()}, weights={"own": 2, "judge": 1})
    [grade] = whole.deciding.grade([(make_problem("a"), "odd")])
    assert grade.correct and grade.reward == 2


# --- while a stage trains --------------------------------------------------------------------------


def test_weights_are_published_once_a_step(random_model_folder, demonstrations, tmp_path, monkeypatch):
    """A measurement gives the engine the weights from which the next rollouts are sampled."""
    synced = []
    monkeypatch.setattr(LocalEngine, "sync", lambda engine: synced.append(engine))

    def measure(vlm, chat):
        engine, inner = LocalEngine(vlm, chat, max_rows=8), measured_by(vlm, chat)
        return lambda stop: engine.sync() or inner(stop)

    train("grpo", random_model_folder, tmp_path, demonstrations, measure=measure)
    assert len(synced) == 5, "before each of 4 steps, and after the last"


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_training_is_bit_for_bit_the_same_with_and_without(
    kind, random_model_folder, demonstrations, tmp_path
):
    def measure(vlm, chat):
        return measured_by(vlm, chat, samples=3)

    without = train(kind, random_model_folder, tmp_path / "a", demonstrations)
    with_it = train(kind, random_model_folder, tmp_path / "b", demonstrations, measure=measure)
    assert_equal_weights(without, with_it)
    assert rows_of(tmp_path / "a" / "metrics.jsonl") == rows_of(tmp_path / "b" / "metrics.jsonl")
    assert measured(tmp_path / "b") == ([0, 2, 4, 6] if kind == "sft" else [0, 2, 4])
    assert all(row.keys() == KEYS for row in read_jsonl(tmp_path / "b" / "validation.jsonl"))
    for stop_at in (2, 3):  # just before a measurement, and between two
        folder = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(Stopped):
            train(kind, random_model_folder, folder, demonstrations, measure=measure, stop_at=stop_at)
        continued = train(kind, random_model_folder, folder, demonstrations, measure=measure)
        assert_equal_weights(without, continued)
        rows = [rows_of(each / "validation.jsonl") for each in (tmp_path / "b", folder)]
        assert rows[0] == rows[1], "nothing is measured twice, and nothing left out"


def test_the_last_step_is_measured_and_a_killed_run_measures_again(
    random_model_folder, demonstrations, tmp_path
):
    """Rows after the checkpoint from which a run goes on belong to steps that are taken again."""
    first = Scripted([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(Stopped):
        train("sft", random_model_folder, tmp_path, demonstrations, measure=first, stop_at=5, epochs=5 / 3)
    [last] = (tmp_path / "checkpoints").glob("step-000005")
    last.rename(tmp_path / "lost")  # as if killed before it was saved
    second = Scripted([0.5, 0.6])
    train("sft", random_model_folder, tmp_path, demonstrations, measure=second, epochs=5 / 3)
    rows = read_jsonl(tmp_path / "validation.jsonl")
    assert [(row["step"], row["accuracy"]) for row in rows] == [(0, 0.1), (2, 0.2), (4, 0.3), (5, 0.5)]
    assert (first.calls, second.calls) == (3, 1)


def test_a_stop_while_measuring_saves_the_step_and_measures_it_later(
    random_model_folder, demonstrations, tmp_path
):
    with pytest.raises(Stopped):
        interrupted = Scripted([0.1, 0.2, 0.3], stop_in=2)
        train("sft", random_model_folder, tmp_path, demonstrations, measure=interrupted, save_every=50)
    assert kept(tmp_path) == [2] and measured(tmp_path) == [0]
    train("sft", random_model_folder, tmp_path, demonstrations, measure=Scripted([0.2, 0.3, 0.4]))
    assert measured(tmp_path) == [0, 2, 4, 6]


def test_trackers_and_screen_get_measurements(random_model_folder, demonstrations, tmp_path, capsys):
    options = {"measure": Scripted([0.25]), "trackers": Trackers(tensorboard=True)}
    train("sft", random_model_folder, tmp_path, demonstrations, **options)
    shown = capsys.readouterr().out
    assert "validation after step 0 of 6: 25.0% right [0.0%, 100.0%] of 10, 0.1 s" in shown
    assert "validation after step 6 of 6" in shown
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (tmp_path / "tensorboard").glob("events.*")
    accumulator = EventAccumulator(str(events)).Reload()
    tag = next(
        t
        for kind in ("scalars", "tensors")
        for t in accumulator.Tags()[kind]
        if t.endswith("sft/validation/accuracy")
    )
    points = accumulator.Scalars(tag) if tag in accumulator.Tags()["scalars"] else accumulator.Tensors(tag)
    assert [point.step for point in points] == [0, 2, 4, 6]


def test_a_measurement_is_sent_once(random_model_folder, demonstrations, tmp_path, monkeypatch):
    """Also where a killed run takes steps again, and measures them again."""
    sent = []
    monkeypatch.setattr(RunTrackers, "send", lambda _, values, step: sent.append((step, "loss" in values)))
    with pytest.raises(Stopped):
        scores = Scripted([0.1, 0.2, 0.3])
        train("sft", random_model_folder, tmp_path, demonstrations, measure=scores, stop_at=5)
    for step in (4, 5):
        (tmp_path / "checkpoints" / f"step-00000{step}").rename(tmp_path / f"lost-{step}")
    again = Scripted([0.2, 0.3, 0.4])
    train("sft", random_model_folder, tmp_path, demonstrations, measure=again)
    assert again.calls == 3 and measured(tmp_path) == [0, 2, 4, 6]
    assert [step for step, is_metric in sent if not is_metric] == [0, 2, 4, 6]


def test_a_json_screen_gets_a_row(capsys):
    with screen("sft", 3, json=True) as view:
        view.say("in words", {"validation": {"step": 2}})
    assert json.loads(capsys.readouterr().out) == {"stage": "sft", "validation": {"step": 2}}


# --- the best checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_best_checkpoint_is_kept_and_is_what_the_stage_ends_with(
    kind, random_model_folder, demonstrations, tmp_path
):
    steps = 6 if kind == "sft" else 4
    best = Scripted([0.9, 0.5, *([0.4] * 3)])  # before training, then after step 2, 4, ...
    options = keeping_best(kind) | {"keep_checkpoints": 1, "save_every": 1}
    final = train(kind, random_model_folder, tmp_path / "best", demonstrations, measure=best, **options)
    done = read_json(tmp_path / "best" / "done.json")
    assert (done["step"], done["rule"]) == (2, "best_pass_1")
    assert kept(tmp_path / "best") == [2, steps], "the best one, and the newest"
    state = Checkpoints(tmp_path / "best" / "checkpoints").load(2)
    reloaded, _ = fresh(tmp_path / "best" / "final")
    assert_equal_weights(final, weights_of(reloaded))
    assert_equal_weights({name: state.model[name] for name in final}, final)
    plain = train(kind, random_model_folder, tmp_path / "plain", demonstrations)
    assert read_json(tmp_path / "plain" / "done.json")["rule"] == "last"
    last = Checkpoints(tmp_path / "best" / "checkpoints").load(steps)
    assert_equal_weights({name: last.model[name] for name in plain}, plain)


def test_of_equals_the_earlier_is_best_and_an_earlier_best_is_pruned(
    random_model_folder, demonstrations, tmp_path
):
    options = keeping_best("sft") | {"keep_checkpoints": 1, "save_every": 50}
    rising = Scripted([0.0, 0.1, 0.3, 0.3])
    train("sft", random_model_folder, tmp_path / "a", demonstrations, measure=rising, **options)
    assert kept(tmp_path / "a") == [4, 6] and read_json(tmp_path / "a" / "done.json")["step"] == 4
    last = Scripted([0.0, 0.1, 0.2, 0.3])
    train("sft", random_model_folder, tmp_path / "b", demonstrations, measure=last, **options)
    assert kept(tmp_path / "b") == [4] and read_json(tmp_path / "b" / "done.json")["step"] == 6


def test_the_best_survives_a_stop(random_model_folder, demonstrations, tmp_path):
    options = keeping_best("sft") | {"keep_checkpoints": 1}
    with pytest.raises(Stopped):
        scores = Scripted([0.0, 0.7, 0.1])
        train("sft", random_model_folder, tmp_path, demonstrations, measure=scores, stop_at=5, **options)
    assert kept(tmp_path) == [2, 5]
    train("sft", random_model_folder, tmp_path, demonstrations, measure=Scripted([0.2]), **options)
    assert kept(tmp_path) == [2, 6] and read_json(tmp_path / "done.json")["step"] == 2


def test_a_damaged_best_gives_way_to_the_next(random_model_folder, demonstrations, tmp_path, caplog):
    options = keeping_best("sft") | {"keep_checkpoints": 9}
    with pytest.raises(Stopped):
        scores = Scripted([0.0, 0.7, 0.5])
        train("sft", random_model_folder, tmp_path, demonstrations, measure=scores, stop_at=5, **options)
    (tmp_path / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"damaged")
    train("sft", random_model_folder, tmp_path, demonstrations, measure=Scripted([0.2]), **options)
    assert read_json(tmp_path / "done.json")["step"] == 4 and "step 2 was the best" in caplog.text


def test_named_steps_are_kept_for_good(random_model_folder, demonstrations, tmp_path, caplog):
    options = {"keep_checkpoints": 1, "save_every": 2}
    train("sft", random_model_folder, tmp_path / "a", demonstrations, keep_steps=[1, 3], **options)
    assert kept(tmp_path / "a") == [1, 3, 4]
    assert "before keep_steps" not in caplog.text
    train("sft", random_model_folder, tmp_path / "b", demonstrations, keep_steps=[7], **options)
    assert "sft ends at step 6, before keep_steps=[7]" in caplog.text


# --- the recipe and the data -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft.handover.rule=best_pass_1"], "set validation.sft_every"),
        (["sft.handover.rule=most_signal", "validation.sft_every=5"], "set validation.samples"),
        (["sft.handover.rule=probe"], "set validation.sft_every"),
        (["sft.handover.rule=probe", "validation.sft_every=5", "study.arms=[base, sft]"], "no arm goes on"),
        (["sft.handover.rule=probe", "validation.sft_every=5", "grpo.steps=90"], "24 of 90 steps"),
        (["grpo.keep=best", "validation.sft_every=5"], "set validation.grpo_every"),
        (["validation.samples=8"], "nothing is measured: set validation.sft_every"),
        (["validation.grpo_every=5", "validation.source=a.jsonl", "data.test=a.jsonl"], "too good"),
        (["validation.samples=8", "validation.grpo_every=1", "validation.temperature=0"], "temperature"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", words)
    assert message in str(caught.value)


def test_the_table_tells_validation_and_what_is_kept_only_where_it_is_on():
    plain = dict(summary_rows(load_recipe("quickstart").recipe))
    assert "validation" not in plain and "kept" not in plain
    words = ["validation.grpo_every=10", "validation.samples=8", "validation.problems=50"]
    words += ["grpo.keep=best", "sft.keep_steps=[20, 40]", "validation.top_p=0.9"]
    rows = dict(summary_rows(load_recipe("quickstart", words).recipe))
    assert rows["validation"] == (
        "every 10 steps of RL: the last 50 problems of the RL data, not trained on; 8 answers each "
        "(pass@1 and pass@8), temperature 1, top-p 0.9, up to 96 tokens"
    )
    assert rows["kept"] == (
        "SFT keeps the checkpoints of these steps for good: 20, 40; "
        "RL ends with the model that is best in validation"
    )
    late = load_recipe("quickstart", ["grpo.keep_steps=[80]", "grpo.steps=50"]).recipe
    assert dict(summary_rows(late))["kept"].endswith("good: 80; RL ends at step 50, before some of them")


def data_with(*words):
    recipe = load_recipe("quickstart", [*SMALL_STUDY, *words]).recipe
    return load_run_data(recipe.study, recipe.data, decode_limit=10**7, validation=recipe.validation)


def test_problems_that_are_measured_are_not_trained_on():
    plain, held = data_with(), data_with("validation.grpo_every=1", "validation.problems=4")
    assert not plain.validation and len(plain.rl) == 12
    assert [*held.rl, *held.validation] == list(plain.rl) and len(held.validation) == 4
    own = data_with("validation.sft_every=1", "validation.source=builtin:puzzles?split=test&count=9&seed=8")
    assert len(own.rl) == 12 and len(own.validation) == 9
    few = data_with(
        "validation.sft_every=1",
        "validation.source=builtin:puzzles?split=test&count=9&seed=8",
        "validation.problems=3",
    )
    assert few.validation == own.validation[:3]
    only_sft = data_with("validation.sft_every=1", "validation.problems=2", "study.arms=[base, sft]")
    assert not only_sft.rl and only_sft.validation == plain.rl[-2:]
    with pytest.raises(DataError, match=r"validation would take 7 of 12.*"):
        hold_out(plain.rl, 7, "a.jsonl")


def test_a_run_goes_on_with_other_checkpoints_to_keep(tmp_path):
    folder = tmp_path / "run"
    run_folder.claim(folder, load_recipe("quickstart").recipe)
    (folder / "sft").mkdir()
    (folder / "sft" / "done.json").write_text("{}")
    other = load_recipe(
        "quickstart", ["grpo.keep_steps=[7]", "sft.save_every=3", "grpo.keep_checkpoints=9"]
    ).recipe
    assert run_folder.recipe_hash(other) == run_folder.recipe_hash(load_recipe("quickstart").recipe)
    run_folder.claim(folder, other)
    assert load_recipe(str(folder / "recipe.yaml")).recipe.grpo.keep_steps == (7,)
    best = load_recipe("quickstart", ["grpo.keep=best", "validation.grpo_every=1"]).recipe
    with pytest.raises(RunFolderError, match="another recipe"):
        run_folder.claim(folder, best)
