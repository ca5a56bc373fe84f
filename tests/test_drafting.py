"""Drafts: found by the last tokens, trusted as far as they were right, and without effect on answers."""

from dataclasses import replace

import pytest
import torch

import family_models
from conftest import make_problem
from rlcs.data.sources import open_builtin
from rlcs.engines import decoding, drafting
from rlcs.engines.branches import DecodeRequest
from rlcs.engines.drafting import Drafter, pass_cost
from rlcs.engines.local import LocalEngine
from rlcs.engines.sampling import choose, uniform
from rlcs.model import attention, loading
from rlcs.model.image_features import image_inputs
from rlcs.model.packing import pack
from rlcs.model.policy import hidden_states
from rlcs.recipe.schema import Model
from rlcs.records.trees import Branch, Tree

FREE = 1e9
"""A pass that costs so much that any draft is worth its tokens."""
ABOUT = 1 << 40
"""A question; answers to others have the numbers after it."""


def drafter(*texts, cost=FREE):
    made = Drafter(cost)
    for about, text in enumerate(texts, ABOUT + 1):
        for end in range(1, len(text) + 1):
            made.learn(text[:end], about)
    return made


def drafted(made, ids, about=ABOUT, *, branches=1, most=8, never=()):
    return made.draft(ids, about, branches=branches, most=most, never=never)


def test_a_draft_is_what_followed_the_longest_run_of_the_same_tokens():
    made = drafter([1, 2, 3, 4, 5, 6], [9, 2, 3, 7, 8])
    assert drafted(made, [1, 2, 3], most=3) == [4, 5, 6]
    assert drafted(made, [9, 2, 3], most=2) == [7, 8]
    assert drafted(made, [0, 2, 3], most=1) == [7], "the latest, where both are equally long"
    assert drafted(made, [55]) == [] == drafted(made, []) == drafted(Drafter(FREE), [1, 2])


def test_answers_to_the_same_question_come_first_and_those_of_before_count():
    made = drafter([*range(50, 60), 1, 2], [*range(50, 60), 7, 8])
    assert drafted(made, [*range(50, 60)]) == [7, 8], "the latest of all"
    assert drafted(made, [*range(50, 60)], ABOUT + 1) == [1, 2], "of this question"
    made.recall([3, 50, 51, 4], ABOUT)
    assert drafted(made, []) == [3, 50, 51, 4], "from the beginning"
    assert drafted(made, [9, 50, 51], most=1) == [52], "what is not as it was is found elsewhere"
    for _ in range(9):
        made.learn([3, 50, 51, 5], ABOUT)
    assert drafted(made, [3, 50, 51]) == [5], "what is said now replaces what was said before"


def test_a_draft_ends_at_the_limit_and_before_what_ends_answers():
    made = drafter(range(30))
    assert drafted(made, [4], most=2) == [5, 6]
    assert drafted(made, [4], most=0) == [] == drafted(made, [4], most=-1)
    assert len(drafted(made, [4], most=99)) == drafting.MOST_TOKENS
    assert drafted(made, [4], never=[7]) == [5, 6]


def test_drafts_are_as_long_as_they_were_right_and_as_a_pass_is_dear():
    steady, fickle = [1, 2, 3, 4] * 20, [5, 6, 7, 5, 8, 7, 6, 5, 7, 8, 6, 8, 5, 5, 6, 8, 7, 7]
    made, first, second = drafter(steady, fickle, cost=50), ABOUT + 1, ABOUT + 2
    assert len(drafted(made, steady, first)) == drafting.MOST_TOKENS
    assert len(drafted(made, fickle, second)) > len(drafted(made, fickle, second, branches=200)) == 0
    assert drafted(drafter(steady, cost=0.001), steady, first, branches=200) == [], "a pass costs its tokens"


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(drafting, "MOST_CONTEXTS", 100)
    made = drafter(range(1000))
    assert len(made._continuations) <= 100 + len(drafting.ORDERS)
    assert drafted(made, [997], most=1) == [998]


def test_what_was_recalled_outlives_what_is_forgotten(monkeypatch):
    monkeypatch.setattr(drafting, "MOST_CONTEXTS", 100)
    made = Drafter(FREE)
    made.recall([1, 2, 3], ABOUT)
    made.recall([5] * 60, ABOUT + 1)  # more than half: left out
    for end in range(1, 1000):
        made.learn(range(100, 100 + end), ABOUT + 2)
    assert drafted(made, [1]) == [2, 3] and len(made._continuations) <= 100 + len(drafting.ORDERS)
    assert drafted(made, [5], ABOUT + 1) == []


def test_a_pass_is_dear_for_small_models_and_on_gpus(vlm):
    text = vlm.model.config.get_text_config()
    small = pass_cost(text, "cpu")
    text.hidden_size = 4096
    assert small > pass_cost(text, "cpu") and pass_cost(text, "cuda") > 10 * pass_cost(text, "cpu")


class Wanton(Drafter):
    """Drafts at every occasion: what is likely, also the end, and behind it nonsense."""

    def draft(self, ids, about, *, branches, most, never):
        found = super().draft(ids, about, branches=1, most=most, never=())
        return [*found[: len(ids) % 4], 7 + len(ids) % 50][: max(0, most)]


def count_logits(vlm):
    """A list that gets, at each pass, the number of logits that it computes."""
    counts = []
    vlm.model.get_output_embeddings().register_forward_hook(lambda m, i, o: counts.append(i[0].shape[-2]))
    return counts


def differing(vlm, chat, prompts, groups, sampling):
    """How many tokens are not those that the logits of training's forward pass give, of how many."""
    different = total = 0
    banned = torch.tensor(sampling.banned_ids)
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    for prompt, group in zip(prompts, groups, strict=True):
        branches = tuple(Branch(ids=r.ids, weights=(1.0,) * len(r.ids), logprobs=r.logprobs) for r in group)
        packed = pack([Tree(prompt=prompt, branches=branches)], chat.patches)
        plan = attention.DensePlan(packed.layout, vlm.device)
        with torch.no_grad():
            images = image_inputs(vlm, packed)
            logits = vlm.logits(hidden_states(vlm, packed.ids, packed.positions, plan=plan, **images))
        trunk, *segments = packed.layout.segments
        for rollout, segment in zip(group, segments, strict=True):
            before = [trunk.stop - 1, *range(segment.start, segment.stop - 1)]
            draws = uniform(torch.tensor([rollout.seed]), torch.arange(len(before)))[:, None]
            ids, _ = choose(logits[before], draws, banned=banned, **settings)
            different += int((ids[:, 0] != torch.tensor(rollout.ids)).sum())
            total += len(before)
    return different, total


def puzzles(chat, count):
    return [chat.prompt(p) for p in open_builtin(f"builtin:puzzles?count={count}&seed=1", "rl")]


@pytest.fixture(scope="module")
def builtin():
    vlm = loading.load(Model(name="builtin"), device=torch.device("cpu"))
    return vlm, loading.make_chat(vlm)


def drafting_as(monkeypatch, drafter):
    monkeypatch.setattr(decoding, "Drafter", drafter)


@pytest.mark.parametrize("drafter", [Drafter, Wanton])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (0.0, 1.0)])
def test_drafted_answers_are_those_that_the_policy_draws(builtin, monkeypatch, drafter, temperature, top_p):
    """By the same numbers, from logits that the training's forward pass computes; ties may fall otherwise."""
    vlm, chat = builtin
    drafting_as(monkeypatch, lambda cost: drafter(FREE))
    prompts = puzzles(chat, 12)
    sampling = chat.sampling(n=8, temperature=temperature, top_p=top_p, max_new_tokens=40, seed=5)
    engine = LocalEngine(vlm, chat, max_rows=24)
    groups = engine.sample(prompts, sampling)
    different, total = differing(vlm, chat, prompts, groups, sampling)
    assert total > 500 and different <= 1
    assert groups == engine.sample(prompts, sampling), "the same call gives the same bits"


@pytest.fixture(scope="module", params=["gemma4", "qwen3_vl_moe", "qwen3_5"])
def family(request, tmp_path_factory):
    """With windows and shared keys; with experts; with states that cannot go back."""
    folder = family_models.build(request.param, tmp_path_factory.mktemp(request.param))
    return loading.load(Model(name=str(folder)), device=torch.device("cpu"))


def test_drafts_change_nothing_for_any_family_setting_or_listener(family, monkeypatch):
    vlm, chat = family, loading.make_chat(family)
    prompts = [chat.prompt(make_problem(name, sizes=s)) for name, s in [("a", ((56, 84),)), ("b", ())]]
    settings = [
        chat.sampling(n=3, max_new_tokens=9, temperature=0.2),
        chat.sampling(max_new_tokens=12, temperature=0.0),
        chat.sampling(n=2, max_new_tokens=1, seed=2),
        chat.sampling(n=2, max_new_tokens=20, temperature=1.5, top_p=0.8, seed=3),
    ]

    def answered(drafter):
        drafting_as(monkeypatch, drafter)
        batch = decoding.DecodingBatch(vlm, chat, keeps_routes=vlm.family.router is not None)
        told = [[] for _ in settings]
        requests = [
            DecodeRequest(
                prompt=prompts[place % 2], sampling=sampling, step=place, num_likeliest=2,
                stops=("e",) if place == 3 else (), listener=told[place].append,
            )
            for place, sampling in enumerate(settings)
        ]  # fmt: skip
        with torch.no_grad():
            batch.add(requests[:2])
            batch.step()
            batch.add(requests[2:])
            while batch.requests:
                batch.step()
        said = [
            sorted((t.index, place, t.id, t.text, t.stop, [i for i, _ in t.likeliest]) for place, t in each)
            for each in map(enumerate_by_answer, told)
        ]
        return said, [[(row.stop, row.ids, row.routes) for row in r.rows] for r in requests]

    plain, drafted = answered(lambda cost: Drafter(0)), answered(Wanton)
    assert plain == drafted
    routes = {len(row[2]) for rows in plain[1] for row in rows}
    assert (max(routes) > 0) == (vlm.family.router is not None)


def enumerate_by_answer(tokens):
    """Tokens with their numbers within their answers, which arrive in turns."""
    counts = {}
    for token in tokens:
        counts[token.index] = counts.get(token.index, -1) + 1
        yield counts[token.index], token


def test_answers_that_agree_are_computed_once_and_drafts_save_passes(builtin, monkeypatch):
    """A guard that counts: more passes, or more computed positions, are slower on any machine."""
    vlm, chat = builtin
    logits = count_logits(vlm)
    sampling = chat.sampling(n=8, temperature=0.5, max_new_tokens=48, seed=5)
    goes_on = replace(sampling, stop_ids=(chat.end_id - 2,))  # never said: answers are as long as they may be
    counts = []
    for drafter in (lambda cost: Drafter(0), Drafter):
        drafting_as(monkeypatch, drafter)
        logits.clear()
        groups = LocalEngine(vlm, chat, max_rows=96).sample(puzzles(chat, 6), goes_on)
        tokens = sum(len(rollout.ids) for group in groups for rollout in group)
        counts.append((tokens, len(logits), sum(logits)))
    (tokens, passes, positions), (same, fewer, more) = counts
    assert tokens == same == 6 * 8 * 48 and passes == 48
    assert positions <= 0.75 * tokens, "72%: one query for all answers that have said the same"
    assert fewer <= 36 and more <= 1.1 * tokens, "33 passes, and 1.01 positions a token"
