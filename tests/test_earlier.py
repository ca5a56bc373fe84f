"""Answers of earlier visits: kept and read again alike, bounded, and drafted from without another answer."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from conftest import make_problem
from rlcs.data.problem_store import ROLLOUTS
from rlcs.distributed import ALONE
from rlcs.engines.local import LocalEngine
from rlcs.model import loading
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.records import Grade, Group, Prompt, Rollout, StopReason
from rlcs.train import earlier
from rlcs.train.earlier import EarlierAnswers
from rlcs.train.rollout_log import RolloutLog, file_of
from test_drafting import count_logits, puzzles

TWO = Grpo(prompts_per_step=2, group_size=3, max_new_tokens=8)


def prompt(name):
    return Prompt(problem_id=name, ids=(1,), images=(), grids=(), spans=(), image_token_id=0, merge_size=2)


def group(name, *texts):
    rollouts = tuple(
        Rollout(problem_id=name, index=i, ids=(7,), logprobs=(0.0,), stop=StopReason.EOS, seed=i, text=text)
        for i, text in enumerate(texts)
    )
    return Group(
        problem=make_problem(name),
        prompt=prompt(name),
        rollouts=rollouts,
        grades=(Grade(reward=1.0, correct=True),) * len(texts),
        advantages=(0.0,) * len(texts),
    )


def drafts(answers, step, *names):
    return [given.earlier for given in answers.given([prompt(name) for name in names], step)]


STEPS = (
    (group("a", "x", "y", "y"), group("b", "p", "q", "r")),
    (group("c", "s", "s", "t"), group("a", "é", "z", "z")),
    (group("b", "", "", "u"), group("c", "long " * 20)),
)


def test_a_problem_brings_what_it_was_answered_most_often_at_its_last_visit():
    answers = EarlierAnswers(TWO, problems=3)
    assert drafts(answers, 0, "a") == [""]
    answers.keep(STEPS[0], step=1)
    assert drafts(answers, 1, "a", "b", "c") == ["y", "p", ""], "of equals the first"
    answers.keep(STEPS[1], step=2)
    assert drafts(answers, 2, "a", "b", "c") == ["z", "p", "s"]
    answers.keep(STEPS[2], step=3)
    assert drafts(answers, 3, "a", "b") == ["z", ""]
    assert drafts(answers, 3, "c") == [("long " * 20)[:32]], "as long as an answer may be, about"


def test_answers_are_forgotten_after_two_epochs():
    answers = EarlierAnswers(TWO, problems=3)  # epochs of two steps
    answers.keep(STEPS[0], step=1)
    assert drafts(answers, 4, "a") == ["y"] and drafts(answers, 5, "a") == [""]


def test_a_run_that_goes_on_reads_what_it_had(tmp_path):
    unbroken, log = EarlierAnswers(TWO, problems=5), RolloutLog(tmp_path / ROLLOUTS)
    for step, groups in enumerate(STEPS, 1):
        unbroken.keep(groups, step=step)
        log.write(step, groups)
    log.write(4, [group("a", "of a step after the checkpoint")])
    log.wait()
    continued = EarlierAnswers(TWO, problems=5)
    continued.read(tmp_path, step=3, world=ALONE)
    names = ("a", "b", "c", "d")
    assert drafts(continued, 3, *names) == drafts(unbroken, 3, *names) != [""] * 4


def test_a_log_that_is_damaged_or_gone_is_left_out(tmp_path):
    log = RolloutLog(tmp_path / ROLLOUTS)
    for step, groups in enumerate(STEPS, 1):
        log.write(step, groups)
    log.wait()
    (tmp_path / ROLLOUTS / file_of(1)).write_text('{"id": "a"}\n')
    (tmp_path / ROLLOUTS / file_of(2)).write_text("[\n")
    answers = EarlierAnswers(TWO, problems=5)
    answers.read(tmp_path, step=4, world=ALONE)
    assert drafts(answers, 4, "a", "c") == ["", ("long " * 20)[:32]]


def test_half_a_character_of_a_foreign_log_is_left_out(tmp_path, chat):
    (tmp_path / ROLLOUTS).mkdir()
    rows = ({"id": "a", "response": "x \ud83d y"}, {"id": "\ud83d", "response": "z"})
    (tmp_path / ROLLOUTS / file_of(1)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = EarlierAnswers(TWO, problems=5)
    answers.read(tmp_path, step=1, world=ALONE)
    assert drafts(answers, 1, "a") == ["x  y"] and chat.text_ids("x  y")


def test_secrets_are_left_out_whether_a_run_goes_on_or_not(tmp_path, monkeypatch):
    """Or both would draft otherwise, and so round otherwise."""
    monkeypatch.setenv("CI_TOKEN", "undefined-token")
    groups, log = (group("a", "it is undefined-token"),), RolloutLog(tmp_path / ROLLOUTS)
    log.write(1, groups)
    log.wait()
    kept, read = EarlierAnswers(TWO, problems=5), EarlierAnswers(TWO, problems=5)
    kept.keep(groups, step=1)
    read.read(tmp_path, step=1, world=ALONE)
    assert drafts(kept, 1, "a") == drafts(read, 1, "a") == ["it is ***"]


A_ROW = 32 + earlier.CHARACTERS_A_ROW


@pytest.mark.parametrize(("most", "kept"), [(2 * 3 * A_ROW * 3, "y"), (2 * 3 * A_ROW * 3 - 1, "")])
def test_where_an_epoch_is_too_long_to_be_read_again_nothing_is_kept(monkeypatch, most, kept):
    monkeypatch.setattr(earlier, "MOST_CHARACTERS", most)
    answers = EarlierAnswers(TWO, problems=6)
    answers.keep(STEPS[0], step=1)
    assert drafts(answers, 1, "a") == [kept]


def test_problems_that_come_again_take_fewer_passes_and_have_the_same_answers():
    """A guard that counts; another seed than at the first visit, so that answers differ from those."""
    vlm = loading.load(Model(name="builtin"), device=torch.device("cpu"))
    chat, logits = loading.make_chat(vlm), count_logits(vlm)
    engine, prompts = LocalEngine(vlm, chat, max_rows=96), puzzles(chat, 6)
    sampling = chat.sampling(n=8, temperature=0.3, max_new_tokens=48, seed=5)
    first = engine.sample(prompts, sampling)
    said = [Counter(rollout.text for rollout in each).most_common(1)[0][0] for each in first]

    def visited(prompts):
        logits.clear()
        groups = engine.sample(prompts, replace(sampling, seed=6))
        return [[rollout.ids for rollout in each] for each in groups], len(logits), sum(logits)

    plain, passes, positions = visited(prompts)
    again, fewer, more = visited([replace(p, earlier=text) for p, text in zip(prompts, said, strict=True)])
    assert plain == again
    assert fewer <= 0.7 * passes and more <= 1.1 * positions, "4 instead of 6: answers have 5 tokens"
