"""Rollouts: the same answers whatever the batching, the policy's own logprobs, nothing forbidden."""

import queue
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_problem, row_inputs
from rlcs.engines import decoding
from rlcs.engines.branches import DecodeRequest
from rlcs.engines.cache import ForestCache, RecordingPlan
from rlcs.engines.local import LocalEngine
from rlcs.engines.onednn_linear import MOST_ROWS, packed
from rlcs.engines.sampling import choose, uniform
from rlcs.errors import OutOfMemory
from rlcs.model.layout import layout_of
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.records import StopReason
from rlcs.records.trees import Branch, Tree


@pytest.fixture
def prompts(chat):
    shapes = [((56, 84),), (), ((84, 84), (56, 56)), ((112, 56),), ((84, 56),)]
    return [chat.prompt(make_problem(f"p{i}", "q " * (i + 1), s)) for i, s in enumerate(shapes)]


def trees_of(prompts, groups):
    return [
        Tree(
            prompt=prompt,
            branches=tuple(
                Branch(ids=r.ids, weights=(1.0,) * len(r.ids), logprobs=r.logprobs) for r in group
            ),
        )
        for prompt, group in zip(prompts, groups, strict=True)
    ]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_sampler_logprobs_are_the_policys(vlm, chat, prompts, temperature, top_p):
    sampling = chat.sampling(max_new_tokens=12, n=3, temperature=temperature, top_p=top_p, seed=3)
    groups = LocalEngine(vlm, chat, max_rows=7).sample(prompts, sampling)
    packed = pack(trees_of(prompts, groups), chat.patches)
    with torch.no_grad():
        scores = score(vlm, packed, temperature=temperature or 1.0)
    torch.testing.assert_close(scores.logprobs, packed.sampler_logprobs, rtol=1e-4, atol=1e-4)


def test_rollouts_do_not_depend_on_batching_or_order(vlm, chat, prompts, monkeypatch):
    sampling = chat.sampling(max_new_tokens=12, n=3, seed=3)
    one_by_one = LocalEngine(vlm, chat, max_rows=3).sample(prompts, sampling, step=5)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 40)
    together = LocalEngine(vlm, chat, max_rows=99).sample(prompts[::-1], sampling, step=5)[::-1]
    assert [[r.ids for r in g] for g in one_by_one] == [[r.ids for r in g] for g in together]
    other_step = LocalEngine(vlm, chat, max_rows=99).sample(prompts, sampling, step=6)
    assert [[r.ids for r in g] for g in other_step] != [[r.ids for r in g] for g in together]
    assert len({r.ids for g in together for r in g}) == 15


def test_greedy_answers_are_those_of_transformers(vlm, chat, prompts):
    sampling = chat.sampling(max_new_tokens=10, temperature=0.0)
    ours = [group[0].ids for group in LocalEngine(vlm, chat, max_rows=8).sample(prompts, sampling)]
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    for prompt, ids in zip(prompts, ours, strict=True):
        inputs = row_inputs(vlm, chat, torch.tensor([prompt.ids]), [prompt])
        theirs = vlm.model.generate(
            **inputs,
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=list(sampling.stop_ids),
            suppress_tokens=list(sampling.banned_ids),
        )
        assert theirs[0, len(prompt.ids) :].tolist() == list(ids)


def test_rows_stop_at_the_end_token_or_the_limit(vlm, chat, prompts):
    likely_end = vlm.model.get_output_embeddings().weight.shape[0] * [0.0]
    likely_end[chat.end_id] = 4.0
    bias = torch.tensor(likely_end)
    vlm.model.get_output_embeddings().register_forward_hook(lambda m, i, out: out + bias)
    sampling = chat.sampling(max_new_tokens=15, n=8, seed=1)
    rollouts = [r for g in LocalEngine(vlm, chat, max_rows=16).sample(prompts, sampling) for r in g]
    assert {r.stop for r in rollouts} == {StopReason.EOS, StopReason.LENGTH}
    for rollout in rollouts:
        assert (rollout.ids[-1] == chat.end_id) == (rollout.stop is StopReason.EOS)
        assert chat.end_id not in rollout.ids[:-1]
        assert len(rollout.ids) <= 15


def test_every_group_is_handed_over_as_soon_as_it_is_finished(vlm, chat, prompts):
    """With four rows the answers to the first prompts end before the last prompt is begun."""
    seen, passes, passes_before = [], [], []
    vlm.model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))

    def on_group(group):
        seen.append(group)
        passes_before.append(len(passes))

    sampling = chat.sampling(max_new_tokens=4, n=2)
    groups = LocalEngine(vlm, chat, max_rows=4).sample(prompts, sampling, on_group=on_group)
    assert len(seen) == len(groups) and {g[0].problem_id: g for g in seen} == {
        g[0].problem_id: g for g in groups
    }
    assert passes_before[0] < len(passes) / 2


class Nowhere:
    """A plan whose attention nobody looks at."""

    recurrence = None

    def attend(self, layer, query, key, value, **_):
        return query


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0, 30, 300])
def test_decoding_attends_as_exactly_as_its_numbers_allow(dtype, offset):
    """Against fp64, and with scores that have much in common: what softmax subtracts must not round them."""
    heads, repeat, size, group, std = 2, 3, 32, 3, 4.0
    layout = layout_of([(37, []), (20, [])])
    generator = torch.Generator().manual_seed(0)

    def rand(heads, length):
        return torch.randn(1, heads, length, size, generator=generator)

    def asked(rows):
        query = rand(heads * repeat, rows) * std
        query[..., 0] = 8.0
        return query.to(dtype)

    def keys(length):
        key = rand(heads, length)
        key[..., 0] = offset * size**0.5 / 8.0
        return key.to(dtype)

    recording = RecordingPlan(Nowhere(), layout, torch.device("cpu"))
    key, value = keys(57), rand(heads, 57).to(dtype)
    recording.attend(0, key, key, value)
    cache = ForestCache.prefilled(recording)
    cache.arrange([0] * group + [1] * group, 0, most=2 * group)
    spans = [(0, 37)] * group + [(37, 57)] * group
    seen = [(key[0, :, a:b].double(), value[0, :, a:b].double()) for a, b in spans]
    for step in range(4):
        if step == 2:  # from here on the trunks have unlike numbers of rows
            kept = [0, 2, 3, 4, 5]
            cache.arrange(kept, step, most=len(kept))
            seen = [seen[index] for index in kept]
        query, key, value = asked(len(seen)), keys(len(seen)), rand(heads, len(seen)).to(dtype)
        cache.begin_pass([step] * len(seen), [1] * len(seen), torch.device("cpu"))
        output = cache.attend(0, query, key, value)
        for row, (ks, vs) in enumerate(seen):
            ks = torch.cat([ks, key[0, :, row : row + 1].double()], 1)
            vs = torch.cat([vs, value[0, :, row : row + 1].double()], 1)
            seen[row] = ks, vs
            scores = query[0, :, row].double().view(heads, repeat, size) @ ks.transpose(1, 2) * size**-0.5
            exact = (scores.softmax(-1) @ vs).view(heads * repeat, size)
            error = (output[0, :, row].double() - exact).norm() / exact.norm()
            assert output.dtype == dtype and error < (1e-4 if dtype == torch.float32 else 0.01)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_uniform_is_splitmix64(seed, counter):
    """Against the published algorithm in Python's unbounded integers."""
    mask = 2**64 - 1
    x = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    expected = ((x ^ (x >> 31)) >> 11) * 2.0**-53
    assert uniform(torch.tensor([seed]), torch.tensor([counter])).item() == expected


def test_choices_follow_the_distribution_and_never_take_a_banned_id():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20000, 4)
    draws = uniform(torch.arange(20000), torch.zeros(20000, dtype=torch.long))[:, None]
    banned = torch.tensor([3])
    ids, logprobs = choose(logits, draws, temperature=1.0, top_p=1.0, banned=banned)
    shares = torch.bincount(ids[:, 0], minlength=4) / 20000
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
    torch.testing.assert_close(shares[:3], expected, rtol=0, atol=0.01)
    assert shares[3] == 0
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).gather(1, ids))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(5000, 4)
    draws = uniform(torch.arange(5000), torch.zeros(5000, dtype=torch.long))[:, None]
    ids, _ = choose(logits, draws, temperature=1.0, top_p=0.7, banned=torch.tensor([], dtype=torch.long))
    assert set(ids[:, 0].tolist()) == {1, 3}


@pytest.mark.parametrize("shape", [(5, 512), (1, 32, 512), (33, 512), (1, 40, 512), (0, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_compute_what_plain_ones_do(shape, bias):
    layer, rows = torch.nn.Linear(512, 515, bias=bias), torch.randn(*shape)
    with torch.no_grad():
        plain = layer(rows)
        with packed(layer):
            torch.testing.assert_close(layer(rows), plain, rtol=1e-5, atol=1e-5)
            layer.weight.zero_()  # the copy does not see it, with which few rows are computed
            if rows.numel():
                by_copy = torch.allclose(layer(rows), plain, rtol=1e-5, atol=1e-5)
                assert by_copy == (rows.numel() <= MOST_ROWS * 512)
    assert "forward" not in vars(layer)


def test_layers_that_cannot_be_packed_stay_plain(monkeypatch):
    kinds = ({}, {"dtype": torch.bfloat16}, {"out_features": 511})
    layers = torch.nn.ModuleList(
        torch.nn.Linear(**{"in_features": 512, "out_features": 512, **kind}) for kind in kinds
    )
    with packed(layers):
        assert [isinstance(layer.forward, partial) for layer in layers] == [True, False, False]
    monkeypatch.setattr("rlcs.engines.onednn_linear.MEMORY_SHARE", 0)
    with packed(layers):
        assert not any(isinstance(layer.forward, partial) for layer in layers)


def test_every_sample_packs_the_weights_of_now(vlm, chat, prompts, packs_all):
    sampling, engine = chat.sampling(max_new_tokens=8, n=2), LocalEngine(vlm, chat, max_rows=8)
    before = engine.sample(prompts, sampling)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(1.5)
    after = engine.sample(prompts, sampling)
    pack_of_now = pack(trees_of(prompts, after), chat.patches)
    with torch.no_grad():
        scores = score(vlm, pack_of_now)
    torch.testing.assert_close(scores.logprobs, pack_of_now.sampler_logprobs, rtol=1e-4, atol=1e-4)
    assert [[r.ids for r in g] for g in before] != [[r.ids for r in g] for g in after]
    assert not any("forward" in vars(module) for module in vlm.model.modules())


def wait_for_engines():
    """Wait until the thread of each engine has ended."""
    end = time.monotonic() + 60
    while any(thread.name == "rlcs-engine" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def packs_all(monkeypatch):
    """Also the narrow layers of the test's model are packed."""
    monkeypatch.setattr("rlcs.engines.onednn_linear.LEAST_WEIGHTS", 1)


def submitted(engine, prompt, sampling):
    """The ids of every answer, when the last has ended and the engine's thread with it."""
    ids = [[] for _ in range(sampling.n)]
    request = engine.submit(prompt, sampling, listener=lambda token: ids[token.index].append(token.id))
    wait_for_engines()
    assert [row.ids for row in request.rows] == ids and all(row.stop for row in request.rows)
    return ids


def test_submitted_requests_keep_the_weights_packed_until_they_are_synced(vlm, chat, prompts, packs_all):
    engine, sampling = LocalEngine(vlm, chat, max_rows=64), chat.sampling(max_new_tokens=8, n=2, seed=4)
    head = vlm.model.get_output_embeddings()
    before = submitted(engine, prompts[0], sampling)
    assert isinstance(head.forward, partial), "the next request finds them packed"
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(1.5)
    engine.sync()
    assert "forward" not in vars(head)
    after = submitted(engine, prompts[0], sampling)
    assert isinstance(head.forward, partial)
    ((first, second),) = LocalEngine(vlm, chat, max_rows=8).sample([prompts[0]], sampling)
    assert after == [list(first.ids), list(second.ids)] != before


def test_packed_weights_go_with_the_engine(vlm, chat, prompts, packs_all):
    engine, head = LocalEngine(vlm, chat, max_rows=64), vlm.model.get_output_embeddings()
    submitted(engine, prompts[0], chat.sampling(max_new_tokens=2))
    assert isinstance(head.forward, partial)
    del engine
    assert "forward" not in vars(head)


def test_sampling_equals_submitting(vlm, chat, prompts, packs_all):
    """Also while the engine packs for submitted requests, and when a thread submits meanwhile."""
    engine, sampling = LocalEngine(vlm, chat, max_rows=7), chat.sampling(max_new_tokens=12, n=3, seed=3)
    one_by_one = [submitted(engine, prompt, sampling) for prompt in prompts]
    meanwhile = []
    thread = threading.Thread(target=lambda: meanwhile.append(submitted(engine, prompts[1], sampling)))
    groups = engine.sample(prompts, sampling, on_group=lambda _: thread.ident or thread.start())
    thread.join()
    assert [[list(r.ids) for r in group] for group in groups] == one_by_one
    assert meanwhile == [one_by_one[1]]
    assert isinstance(vlm.model.get_output_embeddings().forward, partial), (
        "packed again for the submitted one"
    )


def test_requests_with_settings_of_their_own_share_a_batch(vlm, chat, prompts):
    """Each with its n, temperature, top-p, limit, seed, end tokens and banned tokens, as if alone."""
    greedy = chat.sampling(max_new_tokens=9, temperature=0.0)
    likely = submitted(LocalEngine(vlm, chat, max_rows=1), prompts[0], greedy)[0]
    settings = [
        greedy,
        replace(greedy, banned_ids=(likely[0], *greedy.banned_ids)),
        replace(greedy, stop_ids=(likely[4],)),
        chat.sampling(max_new_tokens=5, n=4, temperature=1.4, top_p=0.9, seed=2),
        chat.sampling(max_new_tokens=12, n=2, temperature=0.6, seed=3),
    ]
    batch = decoding.DecodingBatch(vlm, chat)
    requests = [
        DecodeRequest(prompt=prompts[0], sampling=sampling, step=place)
        for place, sampling in enumerate(settings)
    ]
    with torch.no_grad():
        batch.add(requests[:3])
        ended = batch.step() + batch.step()
        batch.add(requests[3:])
        while batch.requests:
            ended += batch.step()
    assert ended == sum(sampling.n for sampling in settings) and batch.live == 0
    for place, (request, sampling) in enumerate(zip(requests, settings, strict=True)):
        (alone,) = LocalEngine(vlm, chat, max_rows=8).sample([prompts[0]], sampling, step=place)
        assert [tuple(row.ids) for row in request.rows] == [r.ids for r in alone]
        assert [row.stop for row in request.rows] == [r.stop for r in alone]
        assert all(len(row.ids) <= sampling.max_new_tokens for row in request.rows)
        assert not {i for row in request.rows for i in row.ids} & set(sampling.banned_ids)


def test_a_failure_before_the_first_request_begins_is_reported(vlm, chat, prompts, monkeypatch):
    """Without an answer whoever submitted would wait for ever."""
    monkeypatch.setattr("rlcs.engines.local.packed", lambda model: 1 / 0)
    engine, events = LocalEngine(vlm, chat, max_rows=8), []
    engine.submit(prompts[0], chat.sampling(max_new_tokens=2), listener=events.append)
    end = time.monotonic() + 60
    while not events:
        assert time.monotonic() < end
    assert isinstance(events[0], ZeroDivisionError) and not engine.waiting and not engine.running


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB"


def test_running_out_of_memory_says_what_so_many_answers_need(vlm, chat, monkeypatch):
    engine = LocalEngine(vlm, chat, max_rows=6)
    prompt = chat.prompt(make_problem("a"))
    sampling = chat.sampling(max_new_tokens=100, n=4)

    def full(*_):
        raise torch.OutOfMemoryError(CUDA)

    text = vlm.model.config.get_text_config()
    size = text.hidden_size // text.num_attention_heads
    a_token = text.num_hidden_layers * text.num_key_value_heads * size * 2 * 4
    needs = f"6 x {len(prompt.ids) + 100} tokens of prompt and answer x {a_token:,} bytes of keys and values"
    monkeypatch.setattr(engine._batch, "step", full)
    with pytest.raises(OutOfMemory, match=r"GPU memory ran out: 2\.00 GB were requested") as caught:
        engine.sample([prompt, prompt], sampling)
    assert needs in caught.value.fix and "--batch, --concurrency, teacher.concurrency" in caught.value.fix
    told = queue.SimpleQueue()
    engine.submit(prompt, sampling, listener=told.put)
    error = told.get(timeout=20)
    assert isinstance(error, OutOfMemory) and needs.replace("6 x", "4 x") in error.fix
    monkeypatch.undo()  # the engine goes on
    assert len(engine.sample([prompt], sampling)[0]) == 4
