"""How much is computed, encoded and written for what is asked: counts with bounds, which no machine changes.

A change that makes training dearer fails here, however fast the machine. A bound that is lowered stays low;
one that has to rise says in CHANGELOG.md what it bought.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from conftest import LengthGrader, make_problem
from rlcs.data import puzzles
from rlcs.doctor.gpu.models import random_tree
from rlcs.engines.local import LocalEngine
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.progress import screen
from rlcs.recipe.stages import Grpo, Sft
from rlcs.records import Demonstration
from rlcs.signals import StopFlag
from rlcs.train import grpo, sft
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir
from test_image_features import tower_runs

POSITIONS_OF_A_USEFUL_TOKEN = 1.15
"""Of rollouts: a prompt's tokens once, an answer's but its last. More are rows that have ended."""
TOKENS_OF_SFT = 1.0
"""Through the model for a token of a demonstration: no padding, no second pass, system messages once."""
TOKENS_OF_A_TARGET = 4.8
"""Through the model in a step of GRPO for an answer token: prompts of 53 tokens, answers of 12 at most."""
ENCODINGS_OF_AN_IMAGE = 3
"""In a step of GRPO whose vision tower trains: rollout, reference, update; never one an answer."""
BYTES_OF_A_STEP = 1_000
"""Written by a step of SFT that saves nothing: its line of metrics."""
BYTES_OF_AN_ANSWER = 1_000
"""Written by a step of GRPO that saves nothing, for each answer: text and metrics."""
ALLOCATED_OF_A_POSITION = 95_000
"""Bytes that torch takes for each position of a decoding pass of the random model; most are given back."""
ALLOCATED_OF_A_TOKEN = 150_000
"""Bytes that torch takes in forward and backward for each token of a tree of the random model."""


@contextmanager
def counted(*models) -> Iterator[list[int]]:
    """The number of tokens of every pass through the language models, in order."""
    passes = list[int]()
    hooks = [
        vlm.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, arguments: passes.append(arguments[0].numel())
        )
        for vlm in models
    ]
    yield passes
    for hook in hooks:
        hook.remove()


def bytes_written() -> int:
    """By this process until now, to whatever (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def allocated(work) -> int:
    """Bytes that torch takes from the system's memory while it works, given back or not."""
    work()  # what is made at first use
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    return sum(max(0, each.self_cpu_memory_usage) for each in found.key_averages())


class Steps:
    """A screen that keeps every step's report, and what had been counted by then."""

    def __init__(self, view, count):
        self.say, self._count, self.seen = view.say, count, []

    def step(self, report):
        self.seen.append((report, self._count()))


@pytest.fixture
def prompts(chat):
    problems = puzzles.load("puzzles", split="train", count=6, seed=5)
    return [chat.prompt(problem) for problem in problems]


# --- rollouts ------------------------------------------------------------------------------------


def rollouts(vlm, chat, prompts, *, max_rows, n=8):
    """Lengths of all answers, which end at one of 16 tokens, and tokens of every pass."""
    engine = LocalEngine(vlm, chat, max_rows=max_rows)
    sampling = chat.sampling(n=n, max_new_tokens=60, seed=1)
    ends = tuple(i for i in range(0, 4096, 16) if i not in sampling.banned_ids)
    sampling = replace(sampling, stop_ids=ends)
    with counted(vlm) as passes:
        groups = engine.sample(prompts, sampling)
    return [len(rollout.ids) for group in groups for rollout in group], passes


def test_a_pass_gives_every_unfinished_answer_a_token(vlm, chat, prompts):
    lengths, passes = rollouts(vlm, chat, prompts, max_rows=64)
    assert len(passes) <= max(lengths), "the prompts' pass gives the first tokens"


def test_rows_that_become_free_are_used_again(vlm, chat, prompts):
    lengths, passes = rollouts(vlm, chat, prompts, max_rows=16)
    full = sum(lengths) / 16
    assert len(passes) <= len(prompts) + full + max(lengths), "only the last answers leave rows free"


@pytest.mark.parametrize("max_rows", [16, 64])
def test_hardly_a_position_is_computed_in_vain(vlm, chat, prompts, max_rows):
    lengths, passes = rollouts(vlm, chat, prompts, max_rows=max_rows)
    useful = sum(len(prompt.ids) for prompt in prompts) + sum(length - 1 for length in lengths)
    assert sum(passes) <= POSITIONS_OF_A_USEFUL_TOKEN * useful


def test_a_decoding_pass_takes_no_more_memory_for_a_position(vlm, chat, prompts):
    engine = LocalEngine(vlm, chat, max_rows=64)

    def sampled(tokens):
        engine.sample(prompts, chat.sampling(n=8, max_new_tokens=tokens, seed=1))

    more = allocated(lambda: sampled(30)) - allocated(lambda: sampled(10))  # without the prompts' pass
    assert more <= ALLOCATED_OF_A_POSITION * len(prompts) * 8 * (30 - 10)


def test_an_image_is_encoded_once_for_all_answers(vlm, chat, prompts):
    with tower_runs(vlm) as encoded:
        rollouts(vlm, chat, prompts, max_rows=16)
    assert sum(encoded) == patches(prompts)


def patches(prompts) -> int:
    return sum(math.prod(grid) for prompt in prompts for grid in prompt.grids)


# --- training ------------------------------------------------------------------------------------


def test_sft_computes_each_token_and_each_image_once(vlm, chat, tmp_path):
    demonstrations = [
        Demonstration(problem=make_problem(f"p{i}"), response="It is four. " * (1 + i), teacher="t")
        for i in range(12)
    ]
    settings = Sft(batch_size=4, epochs=1, save_every=100)
    trees = [sft.tree_of(each, chat) for each in demonstrations]
    with (
        counted(vlm) as passes,
        tower_runs(vlm) as encoded,
        StopFlag() as stop,
        screen("sft", 3, quiet=True) as view,
    ):
        steps = Steps(view, lambda: (sum(passes), sum(encoded), bytes_written(), len(passes)))
        stage = RunDir(tmp_path, name="sft", seed=3, settings=settings, recipe_hash="h")
        sft.train(vlm, chat, demonstrations, settings, run=stage, screen=steps, stop=stop)
    # The first step has the checks of a run's start; the others learn what is left of the epoch.
    (first, before), _, (_, after) = steps.seen
    before_image = [tree.prompt.ids[: tree.prompt.spans[0][0]] for tree in trees]
    head = len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(*before_image, strict=False))))
    repeated = (len(steps.seen) - 1) * head * (settings.batch_size - 1)
    assert head > 3, "more than the first words of the question's turn"
    left = sum(tree.num_tokens for tree in trees) - repeated - first.values["tokens"]
    assert after[0] - before[0] <= TOKENS_OF_SFT * left
    assert after[3] - before[3] == 2, "one pass a step"
    [of_an_image] = {patches([tree.prompt]) for tree in trees}
    assert after[1] - before[1] <= 8 * of_an_image
    assert after[2] - before[2] <= 2 * BYTES_OF_A_STEP


def test_a_pack_takes_no_more_memory_for_a_token(vlm, chat, prompts):
    trees = [random_tree(chat, [], [30] * 8, seed=seed) for seed in range(4)]
    packed = pack(trees, chat.patches)

    def learn():
        score(vlm, packed).logprobs.sum().backward()

    assert allocated(learn) <= ALLOCATED_OF_A_TOKEN * packed.num_tokens


class Watched(LocalEngine):
    """The local engine; keeps what it was asked and what it answered."""

    def sample(self, prompts, sampling, **others):
        groups = super().sample(prompts, sampling, **others)
        self.asked = [*getattr(self, "asked", ()), *zip(prompts, groups, strict=True)]
        return groups


def test_a_grpo_step_computes_a_prompt_once_in_rollout_reference_and_update(vlm, chat, tmp_path):
    settings = Grpo(
        steps=3, prompts_per_step=4, group_size=8, max_new_tokens=12, save_every=100,
        kl={"kind": "k3", "coefficient": 0.01},
    )  # fmt: skip
    reference, engine = grpo.frozen_copy(vlm), Watched(vlm, chat, max_rows=64)
    context = GrpoContext(vlm=vlm, reference=reference, chat=chat, engine=engine, grader=LengthGrader())
    with (
        counted(vlm, reference) as passes,
        tower_runs(vlm, reference) as encoded,
        StopFlag() as stop,
        screen("grpo", 3, quiet=True) as view,
    ):
        steps = Steps(view, lambda: (sum(passes), sum(encoded), bytes_written(), len(engine.asked)))
        stage = RunDir(tmp_path, name="grpo", seed=3, settings=settings, recipe_hash="h")
        problems = puzzles.load("puzzles", split="train", count=12, seed=5)
        grpo.train(context, problems, settings, run=stage, screen=steps, stop=stop)
    (_, before), _, (_, after) = steps.seen
    asked = engine.asked[before[3] : after[3]]
    trunks = sum(len(prompt.ids) for prompt, _ in asked)
    lengths = [len(rollout.ids) for _, group in asked for rollout in group]
    useful = trunks + sum(length - 1 for length in lengths)
    tokens = POSITIONS_OF_A_USEFUL_TOKEN * useful + 2 * (trunks + sum(lengths))
    assert after[0] - before[0] <= tokens
    assert after[0] - before[0] <= TOKENS_OF_A_TARGET * sum(lengths)
    assert after[1] - before[1] <= ENCODINGS_OF_AN_IMAGE * patches(prompt for prompt, _ in asked)
    assert after[2] - before[2] <= BYTES_OF_AN_ANSWER * len(lengths)
