"""Prompts that begin alike are computed once: the next turn, another question about the same image."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import rlcs
from conftest import draw
from rlcs.engines import decoding, prefixes
from rlcs.engines.branches import DecodeRequest
from rlcs.engines.cache_sizes import cache_sizes
from rlcs.engines.decoding import DecodingBatch
from rlcs.engines.local import LocalEngine
from rlcs.engines.prefixes import Prefixes, in_common, rest_of
from rlcs.records import Message
from rlcs.serving.session import Settings
from test_engines_local import wait_for_engines


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Beginnings of a few tokens are worth it, as those of a thousand are."""
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 8)
    monkeypatch.setattr(prefixes, "LEAST_SHARE", 0.3)


@pytest.fixture
def passes(monkeypatch):
    """How many tokens, and how many images, each pass through the model computes."""
    seen = []
    original = decoding.hidden_states

    def counted(vlm, ids, positions, **keywords):
        seen.append((len(ids), len(images_of(keywords))))
        return original(vlm, ids, positions, **keywords)

    def images_of(keywords):
        return [name for name in keywords if name not in ("plan", "routing")]

    monkeypatch.setattr(decoding, "hidden_states", counted)
    return seen


def user(*parts):
    return Message(role="user", parts=parts)


def assistant(text):
    return Message(role="assistant", parts=(text,))


FIRST, SECOND = draw(84, 56, seed=1), draw(56, 84, seed=2)


def talk(chat, turns):
    """The prompts of a conversation, turn by turn; the third has an image of its own."""
    messages = [user(FIRST, "How many circles are there in the picture?")]
    later = (
        [assistant("Two, I believe."), user("And of which colours are both?")],
        [
            assistant("Red and blue."),
            user("Is it", SECOND, "as in this one?"),
        ],
    )
    prompts = [chat.conversation(messages, name="talk")]
    for more in later[: turns - 1]:
        messages += more
        prompts.append(chat.conversation(messages, name="talk"))
    return prompts


def answers(engine, prompts, sampling):
    """What an engine answers to prompts, one after the other."""
    found = []
    for prompt in prompts:
        request = engine.submit(prompt, sampling, listener=lambda _: None)
        wait_for_engines()
        found.append([(row.ids, row.logprobs) for row in request.rows])
    return found


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        for (ids, logprobs), (others, other_logprobs) in zip(one, other, strict=True):
            assert ids == others
            assert logprobs == pytest.approx(other_logprobs, rel=1e-4, abs=1e-4)


def keeps(vlm):
    return not cache_sizes(vlm.model.config.get_text_config()).row_bytes(1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_later_turn_goes_on_from_the_earlier_one(vlm, chat, passes, temperature):
    prompts = talk(chat, 3)
    sampling = chat.sampling(max_new_tokens=6, n=2, temperature=temperature, seed=5)
    expected = answers(LocalEngine(vlm, chat, max_rows=8), prompts, sampling)
    passes.clear()
    engine = LocalEngine(vlm, chat, max_rows=8, prefix_bytes=1 << 24)
    assert_alike(answers(engine, prompts, sampling), expected)
    prefills = [each for each in passes if each[0] > 2 * 6]
    sizes = [len(prompt.ids) for prompt in prompts]
    if not keeps(vlm):
        assert [tokens for tokens, _ in prefills] == sizes
        return
    shared = [in_common(a, b) for a, b in pairwise(prompts)]
    assert all(common / size > 0.5 for common, size in zip(shared, sizes, strict=False))
    rest = [sizes[1] - shared[0], sizes[2] - shared[1]]
    assert [tokens for tokens, _ in prefills] == [sizes[0], *rest]
    assert [bool(images) for _, images in prefills] == [True, False, True], "its image is seen once"
    again = passes.copy()
    assert_alike(answers(engine, prompts[2:], sampling), expected[2:])
    assert passes[len(again)][0] == 1, "all of a prompt but its last token is known"


def test_questions_about_one_image_are_asked_at_once(vlm, chat, passes):
    questions = ("How many circles?", "Which colour has the largest one?", "What else is there to see?")
    prompts = [chat.conversation([user(FIRST, q)], name=q) for q in questions]
    system = Message(role="system", parts=("Look closely, then answer in a few words.",))
    other = chat.conversation([system, user(SECOND, questions[0])], name="other")
    sampling = chat.sampling(max_new_tokens=5, temperature=0.0)
    engine = LocalEngine(vlm, chat, max_rows=8)
    expected = answers(engine, [*prompts, other], sampling)
    batch = DecodingBatch(vlm, chat, prefixes=Prefixes(1 << 24 if keeps(vlm) else 0))
    requests = [DecodeRequest(prompt=prompt, sampling=sampling) for prompt in [*prompts, other]]
    passes.clear()
    with torch.no_grad():
        batch.add(requests)
        prefilled = passes.copy()
        while batch.requests:
            batch.step()
    assert_alike([[(row.ids, row.logprobs) for row in request.rows] for request in requests], expected)
    if keeps(vlm):
        first, *others = prefilled
        assert first[0] == len(prompts[0].ids) + len(other.ids), "what others begin with comes first"
        assert [tokens for tokens, _ in others] == [
            len(prompt.ids) - in_common(prompts[0], prompt) for prompt in prompts[1:]
        ]
        assert [images for _, images in others] == [0, 0]
    else:
        assert len(prefilled) == 1


def test_new_weights_forget_what_the_old_ones_computed(vlm, chat):
    prompts = talk(chat, 2)
    sampling = chat.sampling(max_new_tokens=6, temperature=0.0)
    engine = LocalEngine(vlm, chat, max_rows=8, prefix_bytes=1 << 24)
    answers(engine, prompts, sampling)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(1.5)
    engine.sync()
    found = answers(engine, prompts[1:], sampling)
    assert_alike(found, answers(LocalEngine(vlm, chat, max_rows=8), prompts[1:], sampling))
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(0.8)
    (group,) = engine.sample(prompts[1:], sampling)
    (plain,) = LocalEngine(vlm, chat, max_rows=8).sample(prompts[1:], sampling)
    assert [rollout.ids for rollout in group] == [rollout.ids for rollout in plain]


def test_weights_that_change_after_a_sample_are_seen(vlm, chat):
    prompts = talk(chat, 2)
    sampling = chat.sampling(max_new_tokens=6, temperature=0.0)
    engine = LocalEngine(vlm, chat, max_rows=8, prefix_bytes=1 << 24)
    engine.sample(prompts, sampling)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(1.5)
    assert_alike(
        answers(engine, prompts, sampling), answers(LocalEngine(vlm, chat, max_rows=8), prompts, sampling)
    )


def test_a_failure_lets_go_of_the_memory(vlm, chat, monkeypatch):
    prompts = talk(chat, 2)
    sampling = chat.sampling(max_new_tokens=6, temperature=0.0)
    engine = LocalEngine(vlm, chat, max_rows=8, prefix_bytes=1 << 24)
    expected = answers(engine, prompts, sampling)
    assert engine._prefixes._bytes or not keeps(vlm)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "hidden_states", lambda *_, **__: 1 / 0)
        engine.submit(prompts[0], sampling, listener=lambda _: None)
        wait_for_engines()
    assert not engine._prefixes._bytes
    assert_alike(answers(engine, prompts, sampling), expected)


def test_a_long_rest_is_computed_with_the_whole(chat, monkeypatch):
    first, second = talk(chat, 2)
    kept = Prefixes(1 << 20)
    layers = {0: (torch.ones(1, len(first.ids), 2), torch.ones(1, len(first.ids), 2))}
    kept.keep(first, layers, 0, len(first.ids))
    rest = len(second.ids) - in_common(first, second)
    monkeypatch.setattr(prefixes, "MOST_SCORES", rest * len(second.ids))
    assert kept.find(second)
    monkeypatch.setattr(prefixes, "MOST_SCORES", rest * len(second.ids) - 1)
    assert kept.find(second) is None


def test_an_image_is_never_cut_and_never_taken_for_another(chat):
    plain = chat.conversation([user(FIRST, "How many?")], name="a")
    ((start, stop),) = plain.spans
    assert in_common(plain, chat.conversation([user(FIRST, "How much?")], name="b")) > stop
    assert in_common(plain, chat.conversation([user(SECOND, "How many?")], name="c")) <= start
    twin = replace(plain, images=(draw(84, 56, seed=9),))
    assert twin.ids == plain.ids and in_common(plain, twin) == start
    assert in_common(plain, plain) == len(plain.ids) - 1
    cut = replace(plain, ids=plain.ids[: start + 1], spans=(), images=(), grids=(), image_token_id=-1)
    assert in_common(cut, plain) == start
    two = chat.conversation([user(FIRST, SECOND, "Which?")], name="d")
    one = chat.conversation([user(FIRST, "Which?")], name="e")
    assert one.spans[0][1] <= in_common(one, two) <= two.spans[1][0]
    rest = rest_of(two, two.spans[0][1])
    assert (
        rest.images == (two.images[1],) and rest.ids[slice(*rest.spans[0])] == two.ids[slice(*two.spans[1])]
    )
    assert rest_of(two, two.spans[1][1]).images == ()


def test_memory_is_bounded_and_what_was_used_last_stays(chat):
    def layers(prompt):
        return {0: (torch.ones(2, len(prompt.ids), 4), torch.ones(2, len(prompt.ids), 4))}

    prompts = [
        chat.conversation([user(FIRST if i % 2 else SECOND, f"{i} " * 30)], name=str(i)) for i in range(4)
    ]
    size = max(2 * 2 * 4 * 4 * len(prompt.ids) for prompt in prompts)
    kept = Prefixes(3 * size)
    for prompt in prompts[:3]:
        kept.keep(prompt, layers(prompt), 0, len(prompt.ids))
    assert kept.find(prompts[0])[1] == len(prompts[0].ids) - 1
    kept.keep(prompts[3], layers(prompts[3]), 0, len(prompts[3].ids))
    found = [kept.find(prompt) for prompt in prompts]
    whole = [each is not None and each[1] == len(p.ids) - 1 for each, p in zip(found, prompts, strict=True)]
    assert whole == [True, False, True, True], "the one that was not asked for is gone"
    large = replace(prompts[0], ids=prompts[0].ids + prompts[0].ids[-40:] * 20)
    kept.keep(large, layers(large), 0, len(large.ids))
    assert kept.find(prompts[0])[1] == len(prompts[0].ids) - 1, "one that is too large takes no other's place"
    first, second = talk(chat, 2)
    alone = Prefixes(1 << 20)
    alone.keep(first, layers(first), 0, len(first.ids))
    alone.keep(second, layers(second), 0, len(second.ids))
    assert [each.prompt for each in alone._kept.values()] == [second]
    longer = chat.conversation([user("x " * 9)], name="x")
    prompt = replace(longer, ids=longer.ids + longer.ids)
    alone.clear()
    alone.keep(longer, layers(longer), 0, len(longer.ids))
    alone.keep(prompt, layers(prompt), 0, len(prompt.ids))
    assert [each.prompt for each in alone._kept.values()] == [prompt], "it holds the one that it goes on from"
    nothing = Prefixes(0)
    nothing.keep(prompt, layers(prompt), 0, len(prompt.ids))
    assert nothing.find(prompt) is None and nothing.split([1, 2]) == ([1, 2], [])


def test_a_session_keeps_prompts(passes, monkeypatch):
    monkeypatch.undo()  # at the lengths of real prompts
    session = rlcs.load("builtin")
    sizes = []
    original = decoding.hidden_states

    def counted(vlm, ids, positions, **keywords):
        sizes.append(len(ids))
        return original(vlm, ids, positions, **keywords)

    monkeypatch.setattr(decoding, "hidden_states", counted)
    messages = [session.message(draw(420, 420, seed=3), "How many?")]
    settings = Settings(max_new_tokens=2, temperature=0.0)
    first = session.stream(messages, settings).answer
    messages += [assistant(first.text or "One."), user("And which colour?")]
    second = session.stream(messages, settings).answer
    assert sizes[0] == first.prompt_tokens > 200
    assert second.prompt_tokens > sizes[0] and max(sizes[1:]) < 40
