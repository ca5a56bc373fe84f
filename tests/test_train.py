"""Trainer, SFT and GRPO on real small parts: exact denominators, exact resume, the verdict on bad steps."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import LengthGrader, Stopper, make_conversation, make_problem
from rlcs.data import puzzles
from rlcs.data.stream import ProblemStream
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.protocol import PromptRequest
from rlcs.errors import CheckpointError, DataError, TrainingError
from rlcs.grading import GradePool
from rlcs.model import loading
from rlcs.model.bins import within_budget
from rlcs.model.checkpoints import complete
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.progress import screen
from rlcs.recipe.schema import Images, Prompts, Recipe
from rlcs.recipe.stages import Grpo, Optimizer, Sft
from rlcs.records import Demonstration, Grade, Problem, Rollout, StopReason, rollout_seed
from rlcs.records.trees import Branch, Tree
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_jsonl
from rlcs.train import checkpoint, grpo, sft
from rlcs.train.clock import Clock
from rlcs.train.collecting import Collector, take_prompts
from rlcs.train.context import GrpoContext
from rlcs.train.groups import make_group, shaped_reward, tree_of
from rlcs.train.learning import Learner, make_batches, make_objective
from rlcs.train.losses import sft_loss
from rlcs.train.rollout_log import measure
from rlcs.train.run_dir import RunDir, step_report
from rlcs.train.trainer import Batch, StepResult, Trainer, ZeroGradCounts, combined, learning_rate


def fresh(folder, attention="tree"):
    vlm = loading.load(Recipe(model={"name": str(folder), "attention": attention}).model)
    return vlm, loading.make_chat(vlm)


@pytest.fixture(scope="module")
def demonstrations():
    problems = puzzles.load("puzzles", split="train", count=12, seed=5)
    return [
        Demonstration(problem=p, response=puzzles.teach(p, seed=0, wrong_share=0.0), teacher="builtin")
        for p in problems
    ]


def weights_of(vlm):
    return {name: p.detach().clone() for name, p in vlm.model.named_parameters()}


def assert_equal_weights(first, second, **tolerance):
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def nll(batch, scores):
    return sft_loss(scores.logprobs, batch.pack.weights, batch.pack.sequence, "token")


# --- the trainer ---------------------------------------------------------------------------------


def test_a_step_does_not_depend_on_how_trees_are_packed(random_model_folder, demonstrations):
    """The loss and the gradient norm of one big pack and of many small ones."""
    results = []
    for budget in (10_000, 200, 1):
        vlm, chat = fresh(random_model_folder)
        trees, _ = sft.usable_trees(demonstrations, chat)
        members = within_budget([t.num_tokens for t in trees], budget)
        batches = [Batch(pack=pack([trees[i] for i in some], chat.patches)) for some in members]
        trainer = Trainer(vlm, Optimizer(lr=1e-3), steps=3, max_bad_steps=1)
        results.append((len(batches), trainer.step(batches, nll, average="token")))
    assert len({count for count, _ in results}) == 3
    for _, result in results[1:]:
        assert result.loss == pytest.approx(results[0][1].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(results[0][1].grad_norm, rel=1e-4)


class Reads(TorchDispatchMode):
    """Counts how often Python waits for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_before_the_step_ends(random_model_folder):
    """Then everything in one transfer, and the norm; a GPU does not wait between packs."""
    vlm, chat = fresh(random_model_folder)
    trees = [Tree(prompt=chat.prompt(make_problem(name, sizes=())), branches=(
        Branch(ids=(30, 31, 32), weights=(1.0, 1.0, 1.0), logprobs=(-1.0, -1.0, -1.0)),
    )) for name in "abcde"]  # fmt: skip
    batches = [Batch(pack=pack([tree], chat.patches)) for tree in trees]
    trainer = Trainer(vlm, Optimizer(lr=1e-3), steps=3, max_bad_steps=1)
    objective = make_objective(Grpo(), cap=2.0)
    with Reads() as reads:
        for batch in batches:
            trainer.add(batch, objective)
        assert reads.count == 0
        result = trainer.apply(average="token")
    assert reads.count <= 1, "the norm; a list of numbers on the CPU is no read"
    assert result.tokens == sum(tree.num_tokens for tree in trees) and result.values["sampler_gap"] > 0


def test_counts_known_to_have_no_gradient_enter_the_mean(random_model_folder, demonstrations):
    losses = []
    for extra in (0, 1000):
        vlm, chat = fresh(random_model_folder)
        batch = Batch(pack=pack(sft.usable_trees(demonstrations, chat)[0], chat.patches))
        trainer = Trainer(vlm, Optimizer(lr=0.0), steps=3, max_bad_steps=1)
        result = trainer.step([batch], nll, average="token", zero_grad=ZeroGradCounts(tokens=extra))
        losses.append(result.loss * (result.targets + extra))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_steps_of_one_rollout_step_are_reported_as_one():
    gaps = {"sampler_gap": 0.1, "sampler_gap_max": 0.2}
    first = StepResult(
        loss=1.0, grad_norm=3.0, lr=0.1, tokens=10, targets=4, values={"kl": 0.0, "ratio_max": 5.0, **gaps}
    )
    later = {"kl": 1.0, "ratio_max": 2.0, "sampler_gap": 9.0, "sampler_gap_max": 9.0}
    second = StepResult(loss=2.0, grad_norm=0.0, lr=0.2, tokens=30, targets=6, values=later, skipped="why")
    both = combined([first, second])
    assert (both.loss, both.grad_norm, both.lr, both.tokens, both.targets) == (1.5, 3.0, 0.2, 40, 10)
    assert both.values == {"kl": 0.5, "ratio_max": 5.0, **gaps} and both.skipped == "why"
    assert step_report("g", both, step=1, steps=1, values={}, seconds={"a": 4.0}).values["tokens_per_s"] == 10


@pytest.mark.fault(
    "numbers", "a loss or gradient that is no number", "the step changes nothing; five in a row stop"
)
def test_a_bad_step_changes_nothing_and_too_many_stop_the_run(random_model_folder, demonstrations, tmp_path):
    vlm, chat = fresh(random_model_folder)
    batch = Batch(pack=pack(sft.usable_trees(demonstrations[:2], chat)[0], chat.patches))
    before = weights_of(vlm)
    trainer = Trainer(vlm, Optimizer(lr=1e-3), steps=3, max_bad_steps=2)

    def poisoned(some, scores):
        return sft_loss(scores.logprobs * float("nan"), some.pack.weights, some.pack.sequence, "token")

    result = trainer.step([batch], poisoned, average="token")
    report = step_report("sft", result, step=1, steps=3, values={}, seconds={})
    assert report.skipped and "loss" not in report.values  # NaN is not JSON
    assert result.skipped == "the gradient is not finite"
    assert_equal_weights(before, weights_of(vlm))
    with pytest.raises(TrainingError, match="not finite in 2 steps in a row"):
        trainer.step([batch], poisoned, average="token")


@pytest.mark.parametrize("part", ["vision_tower", "merger", "language_model"])
def test_frozen_parts_stay_and_the_others_learn(random_model_folder, demonstrations, part):
    vlm, chat = fresh(random_model_folder)
    loading.freeze(vlm, [part])
    before = weights_of(vlm)
    trainer = Trainer(vlm, Optimizer(lr=1e-3), steps=3, max_bad_steps=1)
    trees, _ = sft.usable_trees(demonstrations[:4], chat)
    trainer.step([Batch(pack=pack(trees, chat.patches))], nll, average="token")
    is_merger, is_vision = (
        (lambda n: ".visual.merger." in n),
        (lambda n: ".visual." in n and ".merger." not in n),
    )
    frozen = {
        "merger": is_merger,
        "vision_tower": is_vision,
        "language_model": lambda n: ".visual." not in n,
    }[part]
    changed = {name for name, weight in weights_of(vlm).items() if not torch.equal(weight, before[name])}
    assert changed and not any(frozen(name) for name in changed)
    assert all(frozen(name) or name in changed for name in before)


def test_learning_rates():
    cosine = Optimizer(lr=1.0, warmup_steps=2, schedule="cosine")
    assert [round(learning_rate(cosine, s, 6), 4) for s in range(6)] == [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]
    assert learning_rate(Optimizer(lr=1.0, schedule="constant"), 99, 100) == 1.0


# --- SFT -----------------------------------------------------------------------------------------


def run_sft(source, folder, demonstrations, *, stop_at=None, settings=None):
    vlm, chat = fresh(source)
    settings = settings or Sft(batch_size=4, epochs=2, save_every=2, optimizer=Optimizer(lr=1e-3))
    with StopFlag() as stop, screen("sft", 6, quiet=True) as view:
        stage = RunDir(folder, name="sft", seed=3, settings=settings, recipe_hash="h")
        if stop_at is not None:
            view = Stopper(view, stop, stop_at)
        sft.train(vlm, chat, demonstrations, settings, run=stage, screen=view, stop=stop)
    return weights_of(vlm)


def rows_of(path: Path):
    """Metrics without wall times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def test_sft_stopped_and_continued_equals_the_unbroken_run(random_model_folder, demonstrations, tmp_path):
    unbroken = run_sft(random_model_folder, tmp_path / "a", demonstrations)
    with pytest.raises(Stopped, match="sft after step 3 of 6"):
        run_sft(random_model_folder, tmp_path / "b", demonstrations, stop_at=3)
    assert not (tmp_path / "b" / "done.json").exists()
    continued = run_sft(random_model_folder, tmp_path / "b", demonstrations)
    assert_equal_weights(unbroken, continued)
    assert rows_of(tmp_path / "a" / "metrics.jsonl") == rows_of(tmp_path / "b" / "metrics.jsonl")
    reloaded, _ = fresh(tmp_path / "b" / "final")
    assert_equal_weights(unbroken, weights_of(reloaded))


def test_sft_learns_and_its_loss_is_the_token_mean(random_model_folder, demonstrations, tmp_path):
    settings = Sft(batch_size=12, epochs=8, save_every=50, optimizer=Optimizer(lr=3e-3))
    run_sft(random_model_folder, tmp_path / "a", demonstrations, settings=settings)
    losses = [row["loss"] for row in rows_of(tmp_path / "a" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    vlm, chat = fresh(random_model_folder)
    trees, _ = sft.usable_trees(demonstrations, chat)
    with torch.no_grad():
        assert losses[0] == pytest.approx(
            -score(vlm, pack(trees, chat.patches)).logprobs.mean().item(), rel=1e-4
        )


def test_responses_to_one_prompt_are_learnt_as_one_tree_with_the_same_gradients(random_model_folder):
    responses = ["It is four, as one can see at once.", "It is four, as one can count up.", "Five.", "Five."]
    asked = [make_problem(name) for name in ("a", "b", "a", "a", "b")]
    made = [
        Demonstration(problem=problem, response=text, teacher="t")
        for problem, text in zip(asked, [*responses, responses[0]], strict=True)
    ]
    asked_again = [Demonstration(problem=make_conversation("c"), response="4", teacher="t")] * 2
    vlm, chat = fresh(random_model_folder)
    trees = [replace(sft.tree_of(each, chat), trunk_weights=()) for each in made]
    talks = [sft.tree_of(each, chat) for each in asked_again]
    [together] = sft.packs_of([*trees, *talks], vlm, chat, Sft())
    assert len(together.images) == len({p.images[0].sha256 for p in asked}) + 2 * len(talks[0].prompt.images)
    assert together.num_sequences == 7 and together.num_tokens < sum(t.num_tokens for t in [*trees, *talks])
    results = []
    for packs in ([together], [pack([tree], chat.patches) for tree in (*trees, *talks)]):
        vlm.model.zero_grad()
        for packed in packs:
            (-(packed.weights * score(vlm, packed).logprobs).sum()).backward()
        results.append({name: p.grad.clone() for name, p in vlm.model.named_parameters()})
    for name, exact in results[1].items():
        assert float((results[0][name] - exact).norm()) <= 1e-5 * max(1.0, float(exact.norm())), name


def test_trees_of_one_prompt_join_as_long_as_they_fit_a_pack(vlm, chat):
    one = sft.tree_of(Demonstration(problem=make_problem("a"), response="1 2 3", teacher="t"), chat)
    other = replace(one, branches=(replace(one.branches[0], ids=one.branches[0].ids[::-1]),))
    size = replace(one, branches=(*one.branches, *other.branches)).num_tokens
    assert [len(tree.branches) for tree in sft.of_one_prompt([one, other], budget=size)] == [2]
    assert [len(tree.branches) for tree in sft.of_one_prompt([one, other] * 2, budget=size - 1)] == [1] * 4


def test_every_assistant_turn_is_learnt_or_the_last_alone(random_model_folder, tmp_path):
    talks = [
        Demonstration(problem=make_conversation(name), response="\\boxed{4}", teacher="t") for name in "ab"
    ]
    vlm, chat = fresh(random_model_folder)
    losses = {}
    for turns in ("all", "last"):
        settings = Sft(batch_size=2, epochs=1, turns=turns)
        run_sft(random_model_folder, tmp_path / turns, talks, settings=settings)
        [row] = rows_of(tmp_path / turns / "metrics.jsonl")
        packed = pack([sft.tree_of(talk, chat, turns=turns) for talk in talks], chat.patches)
        replies = [t.text for talk in talks for t in talk.problem.history if t.role == "assistant"]
        learnt = ["\\boxed{4}"] * 2 + (replies if turns == "all" else [])
        assert packed.num_targets == sum(len(chat.response_ids(text)) for text in learnt)
        with torch.no_grad():
            losses[turns] = -score(vlm, packed).logprobs.mean().item()
        assert row["loss"] == pytest.approx(losses[turns], rel=1e-4)
    assert losses["all"] != pytest.approx(losses["last"], rel=1e-2)


def test_a_demonstration_that_is_left_out_is_named_once(random_model_folder, tmp_path, caplog):
    long = Demonstration(problem=make_conversation("talk"), response="x", teacher="t")
    short = Demonstration(problem=make_problem("short"), response="x", teacher="t")
    vlm, _ = fresh(random_model_folder)
    chat = loading.make_chat(vlm, prompts=Prompts(max_tokens=60))
    settings = Sft(batch_size=2, epochs=3)
    with StopFlag() as stop, screen("sft", 3, quiet=True) as view:
        stage = RunDir(tmp_path, name="sft", seed=3, settings=settings, recipe_hash="h")
        sft.train(vlm, chat, [long, short], settings, run=stage, screen=view, stop=stop)
    [said] = [text for text in caplog.messages if "leaves a demonstration out" in text]
    assert "talk: the prompt has" in said and "with 4 turns before the question; the limit is 60" in said


def test_seconds_for_which_training_stands_still_are_those_of_the_next_step(
    random_model_folder, demonstrations, tmp_path, monkeypatch
):
    """A slow disk holds up neither the step after a save, nor the next; only another save waits for it."""
    write = checkpoint.write_tensors

    def slow(path, tensors):
        time.sleep(0.4)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    vlm, chat = fresh(random_model_folder)
    settings = Sft(batch_size=1, epochs=5 / len(demonstrations), save_every=2, keep_checkpoints=9)
    with StopFlag() as stop, screen("sft", 5, quiet=True) as view:
        stage = RunDir(tmp_path, name="sft", seed=3, settings=settings, recipe_hash="h")
        sft.train(vlm, chat, demonstrations, settings, run=stage, screen=view, stop=stop)
    seconds = {row["step"]: row["seconds"] for row in read_jsonl(tmp_path / "metrics.jsonl")}
    saving = {step for step, of_step in seconds.items() if "checkpoint" in of_step}
    assert saving == {3, 5} and sorted(complete(tmp_path / "checkpoints")) == [2, 4]
    assert seconds[3]["checkpoint"] + seconds[3]["checkpoint_wait"] < 0.4


def test_a_row_that_cannot_be_a_prompt_is_skipped_and_counted(vlm, demonstrations, tmp_path):
    chat = loading.make_chat(vlm, prompts=Prompts(max_tokens=100))
    long = Demonstration(problem=make_problem("long", "word " * 300), response="x", teacher="t")
    trees, skipped = sft.usable_trees([long, *demonstrations[:2]], chat)
    assert (len(trees), [error.where for error in skipped]) == (2, ["long"])
    with pytest.raises(DataError, match="the limit is 100"):
        sft.usable_trees([long], chat)


def test_a_checkpoint_of_another_recipe_is_refused(random_model_folder, demonstrations, tmp_path):
    with pytest.raises(Stopped):
        run_sft(random_model_folder, tmp_path, demonstrations, stop_at=1)
    vlm, chat = fresh(random_model_folder)
    settings = Sft(batch_size=4, epochs=2)
    stage = RunDir(tmp_path, name="sft", seed=3, settings=settings, recipe_hash="other")
    with (
        StopFlag() as stop,
        screen("sft", 6, quiet=True) as view,
        pytest.raises(CheckpointError, match="another recipe"),
    ):
        sft.train(vlm, chat, demonstrations, settings, run=stage, screen=view, stop=stop)


# --- GRPO ----------------------------------------------------------------------------------------


def run_grpo(source, folder, settings, *, stop_at=None, grader=None, count=10, engine=LocalEngine):
    vlm, chat = fresh(source)
    problems = puzzles.load("puzzles", split="train", count=count, seed=5)
    reference = grpo.frozen_copy(vlm) if settings.kl.active else None
    context = GrpoContext(
        vlm=vlm,
        reference=reference,
        chat=chat,
        engine=engine(vlm, chat, max_rows=8),
        grader=grader or LengthGrader(),
        drafts=True,
    )
    with StopFlag() as stop, screen("grpo", settings.steps, quiet=True) as view:
        stage = RunDir(folder, name="grpo", seed=3, settings=settings, recipe_hash="h")
        if stop_at is not None:
            view = Stopper(view, stop, stop_at)
        grpo.train(context, problems, settings, run=stage, screen=view, stop=stop)
    return weights_of(vlm)


SMALL = {
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 3,
    "max_new_tokens": 8,
    "save_every": 2,
    "optimizer": {"lr": 1e-3},
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer_steps": 2, "kl": {"kind": "k3", "coefficient": 0.01}, "old_logprobs": "policy"},
        {"dynamic_sampling": 2, "advantage": "rloo", "loss": "cispo", "loss_average": "constant"},
        {"dynamic_sampling": 1, "order": "signal"},
        {"entropy": {"control": "bonus", "target": 9.0, "bonus_step": 0.5}},
        {"optimizer_steps": 4, "mismatch_mask": 1e-3, "entropy": {"control": "kl_cov", "share": 0.1}},
    ],
    ids=["plain", "paper", "dapo", "order", "bonus", "held"],
)
def test_grpo_stopped_and_continued_equals_the_unbroken_run(random_model_folder, tmp_path, change):
    settings = Grpo(**SMALL | change)
    unbroken = run_grpo(random_model_folder, tmp_path / "a", settings)
    with pytest.raises(Stopped):
        run_grpo(random_model_folder, tmp_path / "b", settings, stop_at=1)
    continued = run_grpo(random_model_folder, tmp_path / "b", settings)
    assert_equal_weights(unbroken, continued)
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert rows == rows_of(tmp_path / "b" / "metrics.jsonl")
    if settings.entropy.control == "bonus":
        assert [row["entropy_weight"] for row in rows] == [0.0, 0.5, 1.0]
    if settings.mismatch_mask:
        # Which answers move far depends on the CPU's rounding, so that one step may leave out none.
        assert all(row["held_share"] > 0 and row["masked_share"] < 1 for row in rows)
        assert any(row["masked_share"] > 0 for row in rows)
    for path in (tmp_path / "a" / "rollouts").glob("step-*.jsonl"):
        assert path.read_text() == (tmp_path / "b" / "rollouts" / path.name).read_text()


def test_problems_that_come_again_bring_their_answers_also_after_a_stop(random_model_folder, tmp_path):
    settings, brought = Grpo(**SMALL), []

    class Noting(LocalEngine):
        def sample(self, prompts, sampling, *, step=0, **options):
            brought.append([(step, prompt.problem_id, prompt.earlier) for prompt in prompts])
            return super().sample(prompts, sampling, step=step, **options)

    run_grpo(random_model_folder, tmp_path / "a", settings, engine=Noting, count=4)
    unbroken = brought.copy()
    with pytest.raises(Stopped):
        run_grpo(random_model_folder, tmp_path / "b", settings, stop_at=1, engine=Noting, count=4)
    brought.clear()
    run_grpo(random_model_folder, tmp_path / "b", settings, engine=Noting, count=4)
    assert unbroken[1:] == brought and len(brought) == 2
    assert not any(text for *_, text in unbroken[0]) and any(text for *_, text in unbroken[1])


def test_grpo_does_not_depend_on_the_pack_budget(random_model_folder, tmp_path):
    one = run_grpo(random_model_folder, tmp_path / "a", Grpo(**SMALL | {"steps": 1}))
    many = run_grpo(random_model_folder, tmp_path / "b", Grpo(**SMALL | {"steps": 1, "pack_tokens": 1}))
    # Adam divides by the gradient's size, so the rounding of the few gradients near zero shows: those
    # weights may move by up to lr the other way, all others must agree within 2% of lr.
    for name, weight in one.items():
        gap = (many[name] - weight).abs()
        assert gap.max() <= 2e-3 and (gap > 2e-5).float().mean() <= 1e-3, name


def test_images_of_the_next_step_are_decoded_while_this_one_is_sampled(random_model_folder):
    """The engine here samples nothing before that is so; `images.workers=0` does without it."""
    settings = Grpo(**SMALL)
    vlm, chat = fresh(random_model_folder)
    chat = loading.make_chat(vlm, images=Images(workers=2, cache_gb=0.25))
    problems = puzzles.load("puzzles", split="train", count=10, seed=5)
    stream = ProblemStream(problems, seed=3)
    ahead = {ref.sha256 for problem in stream.peek(8) for ref in problem.images}

    class Waiting(LocalEngine):
        def sample(self, prompts, sampling, **options):
            deadline = time.monotonic() + 60
            while not ahead <= chat._images._readable:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return super().sample(prompts, sampling, **options)

    context = GrpoContext(
        vlm=vlm, reference=None, chat=chat, engine=Waiting(vlm, chat, max_rows=8), grader=LengthGrader()
    )
    sampling = chat.sampling(n=3, max_new_tokens=4)
    *_, groups = Collector(context, stream, settings, sampling).collect(0, Clock())
    assert len(groups.arrived) == 4
    assert chat._images._cache_bytes == 1 << 28 and chat._images._workers == 2
    lazy = loading.make_chat(vlm, images=Images(workers=0))
    lazy.prepare(ref for problem in problems for ref in problem.images)
    assert not lazy._images._waiting and not lazy._images._threads


def test_flat_groups_are_not_computed_but_their_tokens_count(random_model_folder):
    """Learning without the flat groups equals learning with them, to the bit of the denominator."""
    settings = Grpo(**SMALL)
    vlm, chat = fresh(random_model_folder)
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None)
    groups = [
        group_of(chat, "a", [1.0, 0.0, 1.0], settings),
        group_of(chat, "b", [1.0, 1.0, 1.0], settings),
        group_of(chat, "c", [0.0, 0.0, None], settings),
    ]
    results = {}
    for name in ("skipped", "computed"):
        vlm, _ = fresh(random_model_folder)
        trainer = Trainer(vlm, settings.optimizer, steps=1, max_bad_steps=1)
        if name == "skipped":
            learner = Learner(trainer, context, settings, Clock())
            learner.add(list(enumerate(groups)))
            [result] = learner.finish()
        else:
            trees = [tree_of(group) for group in groups]
            batches = make_batches(trees, context, settings)
            result = trainer.step(batches, make_objective(settings), average="token")
        results[name] = result
    assert results["skipped"].tokens < results["computed"].tokens
    assert results["skipped"].grad_norm == pytest.approx(results["computed"].grad_norm, rel=1e-4)
    assert results["skipped"].loss == pytest.approx(results["computed"].loss, abs=1e-6)


def group_of(chat, name, rewards, settings):
    problem = make_problem(name)
    rollouts = [
        Rollout(problem_id=name, index=i, ids=(30 + i, 40, 50 + i), logprobs=(-1.0,) * 3, stop=StopReason.EOS,
                seed=i, text="t")
        for i in range(len(rewards))
    ]  # fmt: skip
    grades = [Grade(reward=r, correct=None if r is None else r == 1.0) for r in rewards]
    return make_group(problem, chat.prompt(problem), rollouts, grades, settings)


def test_answers_that_begin_alike_are_learnt_from_once_and_to_the_same_end(random_model_folder):
    settings, beginning = Grpo(**SMALL), tuple(range(30, 54))
    vlm, chat = fresh(random_model_folder)
    groups = []
    for name, rewards in (("a", (1.0, 0.0, 0.0)), ("b", (0.0, 0.0, 1.0))):
        group = group_of(chat, name, rewards, settings)
        rollouts = (replace(r, ids=(*beginning, *r.ids), logprobs=(-1.0,) * 27) for r in group.rollouts)
        groups.append(replace(group, rollouts=tuple(rollouts)))
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None)
    learner = Learner(Trainer(vlm, settings.optimizer, steps=1, max_bad_steps=1), context, settings, Clock())
    learner.add(list(enumerate(groups)))
    [merged] = learner.finish()
    other, _ = fresh(random_model_folder)
    context = replace(context, vlm=other)
    trainer = Trainer(other, settings.optimizer, steps=1, max_bad_steps=1)
    batches = make_batches([tree_of(group) for group in groups], context, settings)
    apart = trainer.step(batches, make_objective(settings), average="token")
    assert (merged.targets, apart.tokens - merged.tokens) == (apart.targets, 2 * 2 * len(beginning))
    assert merged.loss == pytest.approx(apart.loss, abs=1e-6)
    assert merged.grad_norm == pytest.approx(apart.grad_norm, rel=1e-4)


def test_unscored_rollouts_leave_the_group(chat):
    group = group_of(chat, "u", [1.0, None, 0.0], Grpo(**SMALL))
    assert group.advantages[1] is None
    assert group.advantages[0] == pytest.approx(1 / math.sqrt(2), rel=1e-4)
    assert [b.ids[0] for b in tree_of(group).branches] == [30, 32]


def test_length_rewards_short_right_answers_and_never_long_or_wrong_ones(chat):
    problem, settings = make_problem("l"), Grpo(**SMALL | {"reward": {"length": 0.4}})
    rollouts = [
        Rollout(
            problem_id="l", index=i, ids=(30,) * n, logprobs=(-1.0,) * n, stop=StopReason.EOS, seed=i, text=""
        )
        for i, n in enumerate((2, 6, 4, 2, 9))
    ]
    right, wrong = Grade(reward=1.0, correct=True, parts={"accuracy": 1.0}), Grade(reward=0.0, correct=False)
    unscored = Grade(reward=None, correct=None, why="timed out")
    group = make_group(
        problem, chat.prompt(problem), rollouts, [right, right, wrong, wrong, unscored], settings
    )
    assert [g.parts.get("length") for g in group.grades] == [0.5, -0.5, 0.0, 0.0, None]
    assert [g.reward for g in group.grades] == [pytest.approx(1.2), pytest.approx(0.8), 0.0, 0.0, None]
    assert list(group.grades[0].parts) == ["accuracy", "length"]
    alike = make_group(problem, chat.prompt(problem), rollouts[:1] * 2, [right, wrong], settings)
    assert [g.parts["length"] for g in alike.grades] == [0.0, 0.0]


def test_parts_of_a_reward_are_measured_over_the_answers_that_have_them(chat):
    group = group_of(chat, "m", [1.0, None, 0.0], Grpo(**SMALL))
    parts = (
        {"accuracy": 1.0, "brief": 0.5},
        {"accuracy": 1.0, "brief": None},
        {"accuracy": 0.0, "brief": 0.1},
    )
    grades = tuple(replace(g, parts=own) for g, own in zip(group.grades, parts, strict=True))
    values = measure([replace(group, grades=grades)])
    assert values["reward_accuracy"] == pytest.approx(2 / 3) and values["reward_brief"] == pytest.approx(0.3)
    alone = tuple(replace(g, parts={"accuracy": 1.0}) for g in group.grades)
    assert not any(name.startswith("reward_") for name in measure([replace(group, grades=alone)]))


def test_a_step_without_any_score_ends_the_run_and_is_taken_again(random_model_folder, tmp_path):
    class Failing(LengthGrader):
        """Scores nothing in the second step."""

        calls = 0

        def grade(self, pairs):
            self.calls += 1
            fails = Grade(reward=None, correct=None, why="score: timed out after 5 s")
            return [fails for _ in pairs] if self.calls == 2 else super().grade(pairs)

    settings = Grpo(**SMALL | {"save_every": 50})
    unbroken = run_grpo(random_model_folder, tmp_path / "a", settings)
    with pytest.raises(
        TrainingError, match=r"none of the 12 answers of step 2 is scored; 12 .*timed out"
    ) as caught:
        run_grpo(random_model_folder, tmp_path / "b", settings, grader=Failing())
    assert "raise grpo.reward.deadline_s" in caught.value.fix
    assert (tmp_path / "b" / "checkpoints" / "step-000001").is_dir()
    assert len(rows_of(tmp_path / "b" / "rollouts" / "step-000002.jsonl")) == 12
    continued = run_grpo(random_model_folder, tmp_path / "b", settings)
    assert_equal_weights(unbroken, continued)


def test_overlong_answers_are_punished_or_dropped(chat):
    soft = Grpo(**SMALL | {"max_new_tokens": 4, "overlong": {"buffer": 2, "penalty": 0.5}})
    rollout = Rollout(
        problem_id="x", index=0, ids=(1, 2, 3), logprobs=(-1.0,) * 3, stop=StopReason.LENGTH, seed=0, text="t"
    )
    right = Grade(reward=1.0, correct=True)
    assert shaped_reward(rollout, right, soft) == 0.75
    dropped = Grpo(**SMALL | {"overlong": {"drop_truncated": True}})
    assert shaped_reward(rollout, right, dropped) is None


def test_dynamic_sampling_replaces_flat_groups_and_ends(random_model_folder, tmp_path):
    class Once(LengthGrader):
        """Everything is flat in the first round of a step, mixed in the second."""

        calls = 0

        def grade(self, pairs):
            self.calls += 1
            if self.calls % 2:
                return [Grade(reward=0.0, correct=False) for _ in pairs]
            return super().grade(pairs)

    settings = Grpo(**SMALL | {"steps": 1, "dynamic_sampling": 1})
    run_grpo(random_model_folder, tmp_path / "a", settings, grader=Once(), count=40)
    [row] = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert row["zero_variance_groups"] < 1.0 and not row.get("skipped")


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_problem_asked_twice_in_a_step_gets_other_answers(vlm, chat, rounds):
    """Four problems fill eight places, or are all asked again because the first round was flat."""
    settings = Grpo(**SMALL | {"prompts_per_step": 8 // rounds, "dynamic_sampling": rounds - 1})
    problems = puzzles.load("puzzles", split="train", count=4, seed=5)
    sampling = chat.sampling(n=3, max_new_tokens=8, seed=3)
    engine = LocalEngine(vlm, chat, max_rows=8)
    asked = []

    class Kept:
        def sync(self):
            pass

        def rest(self):
            pass

        def sample(self, prompts, sampling, *, step):
            asked.extend(prompts)
            answers.extend(engine.sample(prompts, sampling, step=step))
            return answers[-len(prompts) :]

    runs = []
    for _ in range(2):
        asked, answers = [], []
        context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=Kept(), grader=Never())
        stream = ProblemStream(problems, seed=3)
        list(Collector(context, stream, settings, sampling).collect(5, Clock()))
        runs.append(answers)
        assert sorted(p.problem_id for p in asked) == sorted([p.id for p in problems] * 2)
    assert runs[0] == runs[1]
    for problem in problems:
        first, second = (group for group in runs[0] if group[0].problem_id == problem.id)
        assert [r.seed for r in first] == [rollout_seed(3, 5, problem.id, i) for i in range(3)]
        assert [r.index for r in first] == [r.index for r in second] == [0, 1, 2]
        assert not {r.ids for r in first} & {r.ids for r in second}
        once, again = (
            PromptRequest(prompt=p, sampling=sampling, step=5, resized=chat.resized).body()
            for p in asked
            if p.problem_id == problem.id
        )
        assert once["sampling_params"]["seed"] == rollout_seed(3, 5, problem.id, 0) >> 1
        assert once["sampling_params"].pop("seed") != again["sampling_params"].pop("seed") and once == again


def test_a_judge_starts_on_the_first_group_while_others_are_sampled(vlm, chat):
    settings, events = Grpo(**SMALL), []

    class Recorder:
        def start(self, answers):
            events.append(answers)

    class Sampled(LocalEngine):
        def sample(self, *args, **settings):
            groups = super().sample(*args, **settings)
            events.append("sampled")
            return groups

    problems = puzzles.load("puzzles", split="train", count=4, seed=5)
    sampling = chat.sampling(n=3, max_new_tokens=8, seed=3)
    engine = Sampled(vlm, chat, max_rows=6)
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=engine, grader=Never(), judge=Recorder())
    collector = Collector(context, ProblemStream(problems, seed=3), settings, sampling)
    [found] = collector.collect(0, Clock())
    assert len(events) == 4 + 1 and events[-1] == "sampled"
    expected = [[(group.problem, rollout.text) for rollout in group.rollouts] for group in found.chosen]
    assert sorted(events[:-1], key=str) == sorted(expected, key=str)


class Never:
    """Nothing is ever right."""

    def grade(self, pairs):
        return [Grade(reward=0.0, correct=False) for _ in pairs]


FLAT = {"steps": 9, "max_zero_variance_steps": 2}
KL = {"kl": {"kind": "k3", "coefficient": 0.01}}


@pytest.mark.parametrize("kl", [{}, KL], ids=["plain", "kl"])
def test_a_run_without_any_signal_stops_with_advice(random_model_folder, tmp_path, kl):
    settings = Grpo(**SMALL | FLAT | kl)
    with pytest.raises(TrainingError, match="no group had two different rewards in 2 steps"):
        run_grpo(random_model_folder, tmp_path / "a", settings, grader=Never())
    [row] = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert row["zero_variance_groups"] == 1.0 and bool(row.get("skipped")) != bool(kl)


def test_flat_steps_before_a_stop_count(random_model_folder, tmp_path):
    settings = Grpo(**SMALL | FLAT | KL)
    with pytest.raises(Stopped):
        run_grpo(random_model_folder, tmp_path / "a", settings, grader=Never(), stop_at=1)
    with pytest.raises(TrainingError, match="in 2 steps"):
        run_grpo(random_model_folder, tmp_path / "a", settings, grader=Never())
    assert len(rows_of(tmp_path / "a" / "metrics.jsonl")) == 1


def test_grpo_raises_the_reward(random_model_folder, tmp_path):
    """A learnable game: answers should contain the end token early."""

    class Short:
        def grade(self, pairs):
            return [Grade(reward=float(len(t) < 12), correct=len(t) < 12) for _, t in pairs]

    settings = Grpo(
        steps=12,
        prompts_per_step=8,
        group_size=8,
        max_new_tokens=12,
        optimizer={"lr": 3e-3, "betas": (0.9, 0.95)},
    )
    run_grpo(random_model_folder, tmp_path / "a", settings, grader=Short())
    rewards = [row["reward"] for row in rows_of(tmp_path / "a" / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_real_graders_take_part(random_model_folder, tmp_path):
    settings = Grpo(**SMALL | {"steps": 1})
    with GradePool(workers=1, deadline_s=5, allow_fallbacks=False) as pool:
        run_grpo(random_model_folder, tmp_path / "a", settings, grader=pool)
    [row] = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert row["unscored"] == 0.0 and row["no_format_share"] > 0.5


def test_a_problem_that_cannot_be_a_prompt_gives_its_place_to_the_next(vlm):
    chat = loading.make_chat(vlm, prompts=Prompts(max_tokens=100))
    long = [make_problem(f"long{i}", "word " * 300) for i in range(3)]
    short = [Problem(id=f"s{i}", source="t", question="q", answer="1") for i in range(6)]
    problems, prompts, skipped = take_prompts(ProblemStream([*long, *short], seed=0), chat.prompts, 6)
    assert len(problems) == len(prompts) == 6 and skipped >= 1
    with pytest.raises(DataError):
        take_prompts(ProblemStream(long, seed=0), chat.prompts, 3)
