"""Talking to a model from Python, and the engine behind it: many at once, each as if alone."""

import subprocess
import sys
import threading
import time

import pytest
import torch

import rlcs
from conftest import draw, make_problem, row_inputs
from rlcs.data.images import open_image
from rlcs.engines.detokenizer import Detokenizer
from rlcs.engines.local import LocalEngine
from rlcs.errors import DataError, ImageError, ModelError, PromptError, UserError
from rlcs.model import loading
from rlcs.model.source import BUILTIN
from rlcs.records import StopReason
from rlcs.serving.session import Session, Settings, split_answer


@pytest.fixture
def session(vlm):
    return Session(vlm, name="random")


def gather(engine, prompt, sampling, stops=()):
    """Submit, and a function that waits for texts, ids and stops by index."""
    events, done = [], threading.Event()

    def listener(event):
        events.append(event)
        ended = sum(isinstance(e, Exception) or e.stop is not None for e in events)
        if isinstance(event, Exception) or ended == sampling.n:
            done.set()

    ticket = engine.submit(prompt, sampling, listener=listener, stops=stops)

    def result():
        assert done.wait(60)
        rows = {}
        for event in events:
            text, ids, _ = rows.get(event.index, ("", (), None))
            rows[event.index] = (text + event.text, (*ids, event.id), event.stop)
        return [rows[i] for i in range(sampling.n)]

    return ticket, result


@pytest.mark.parametrize("name", BUILTIN)
def test_three_lines_answer_about_an_image(name):
    answer = rlcs.load(name).ask(draw(84, 84), "How many red circles are there?")
    assert answer.text and answer.tokens > 0 and answer.prompt_tokens > 9 and answer.seconds > 0


def test_an_image_is_a_path_bytes_a_picture_or_several(session, tmp_path):
    ref = draw(84, 84)
    path = tmp_path / "a.png"
    path.write_bytes(ref.data)
    picture = open_image(ref, limit=10**6)
    settings = {"max_new_tokens": 8}
    first = session.ask(ref, "How many?", **settings)
    for image in (str(path), path, ref.data, picture, [path]):
        assert session.ask(image, "How many?", **settings).text == first.text
    assert session.ask([path, ref], "How many?", **settings).prompt_tokens > first.prompt_tokens
    assert session.ask(None, "How many?", **settings).prompt_tokens < first.prompt_tokens


def test_greedy_answers_are_those_of_transformers(vlm, session):
    message = session.message(draw(84, 56), "How many?")
    prompt = session.chat.conversation([message], name="c")
    ours = session.ask(draw(84, 56), "How many?", max_new_tokens=10)
    sampling = session.sampling(prompt, Settings())
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    theirs = vlm.model.generate(
        **row_inputs(vlm, session.chat, torch.tensor([prompt.ids]), [prompt]),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=list(sampling.stop_ids),
        suppress_tokens=list(sampling.banned_ids),
    )
    assert session.chat.text(theirs[0, len(prompt.ids) :].tolist()) == ours.text


def test_several_turns_stream_and_the_pieces_are_the_answer(session):
    messages = [
        session.message([draw(56, 56), draw(84, 56)], "Compare."),
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": [draw(56, 84), "And this one?"]},
    ]
    stream = session.stream(messages, Settings(max_new_tokens=20, temperature=1.0, seed=4))
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == stream.answer.text
    again = session.stream(messages, Settings(max_new_tokens=20, temperature=1.0, seed=4)).answer
    assert again.text == stream.answer.text and again.stop == "length" and again.tokens == 20
    other = session.stream(messages, Settings(max_new_tokens=20, temperature=1.0)).answer
    assert other.text != again.text


def test_the_session_asks_in_the_words_of_the_training(vlm, tmp_path):
    from rlcs.recipe.schema import Images, Model, Prompts

    loading.make_chat(vlm, prompts=Prompts(system="Trained words."), images=Images(max_pixels=56 * 56))
    loading.save(vlm, tmp_path)
    session = Session(loading.load(Model(name=str(tmp_path))), name="trained")
    prompt = session.chat.conversation([session.message(draw(280, 280), "x")], name="c")
    assert "Trained words." in session.chat.text(prompt.ids)
    assert prompt.spans[0][1] - prompt.spans[0][0] == 4


def test_what_cannot_be_asked_says_why(session, tmp_path):
    with pytest.raises(ImageError, match="missing"):
        session.ask(tmp_path / "no.png", "?")
    with pytest.raises(DataError):
        session.ask(b"no image", "?")
    with pytest.raises(ImageError, match="a float is no image"):
        session.ask(1.5, "?")
    with pytest.raises(PromptError, match="4095"):
        session.ask(None, "word " * 9000)
    with pytest.raises(UserError, match="cannot be used"):
        session.ask(None, "?", top_p=0.0)
    with pytest.raises(PromptError, match="no message"):
        session.stream([{"role": "tool", "content": "x"}])
    with pytest.raises(ModelError):
        rlcs.load(str(tmp_path))


def test_an_answer_ends_where_the_context_ends(session):
    answer = session.ask(None, "word " * 1010, max_new_tokens=10**6)
    assert answer.prompt_tokens + answer.tokens <= session.context


def test_import_is_light():
    program = "import rlcs, sys; assert callable(rlcs.load); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_reasoning_and_answer_are_told_apart():
    assert split_answer("3 and 4 make 7, so \\boxed{7}.") == ("3 and 4 make 7, so", "7")
    assert split_answer("<think>hm \\boxed{1}</think>It is \\boxed{2}") == ("hm \\boxed{1}", "2")
    assert split_answer("<think>hm") == ("hm", None)
    assert split_answer("so \\fbox{5}") == ("so", "5")
    assert split_answer("so \\boxed {\\framebox{5}} units") == ("so", "\\framebox{5}")
    assert split_answer("no box") == ("no box", None)


# --- many at once ------------------------------------------------------------------------------


def test_requests_of_all_kinds_get_what_they_would_get_alone(vlm, chat):
    engine = LocalEngine(vlm, chat, max_rows=7)
    asked = []
    for number in range(12):
        prompt = chat.prompt(
            make_problem(f"p{number}", "q " * (number % 5 + 1), ((56, 28 * (number % 3 + 1)),))
        )
        sampling = chat.sampling(
            max_new_tokens=3 + number, n=1 + number % 3, temperature=(0.0, 0.7, 1.3)[number % 3],
            top_p=(1.0, 0.8)[number % 2], seed=number,
        )  # fmt: skip
        asked.append((prompt, sampling, gather(engine, prompt, sampling)[1]))
        time.sleep(0.005 * (number % 4))
    for prompt, sampling, result in asked:
        (alone,) = LocalEngine(vlm, chat, max_rows=8).sample([prompt], sampling)
        got = result()
        assert [ids for _, ids, _ in got] == [rollout.ids for rollout in alone]
        assert [text for text, _, _ in got] == [rollout.text for rollout in alone]
        assert [stop for _, _, stop in got] == [rollout.stop for rollout in alone]
    _wait_until(lambda: not engine.running and not _engine_threads())


def _engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "rlcs-engine"]


def _wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_cancelled_request_leaves_and_its_neighbour_does_not_notice(vlm, chat):
    engine = LocalEngine(vlm, chat, max_rows=4)
    prompt = chat.prompt(make_problem("p"))
    long = chat.sampling(max_new_tokens=3000, n=2, seed=1)
    short = chat.sampling(max_new_tokens=40, n=2, seed=2)
    ticket, _ = gather(engine, prompt, long)
    _, result = gather(engine, prompt, short)
    queued, _ = gather(engine, prompt, long)
    queued.cancel()
    _wait_until(lambda: engine.running == 2)
    ticket.cancel()
    (alone,) = LocalEngine(vlm, chat, max_rows=8).sample([prompt], short)
    assert [ids for _, ids, _ in result()] == [rollout.ids for rollout in alone]
    _wait_until(lambda: engine.running == engine.waiting == 0 and not _engine_threads())


def test_memory_is_reserved_before_a_request_begins(vlm, chat):
    prompt = chat.prompt(make_problem("p"))
    sampling = chat.sampling(max_new_tokens=100, seed=1)
    engine = LocalEngine(vlm, chat, max_rows=64, cache_tokens=2 * (len(prompt.ids) + 100))
    results = [gather(engine, prompt, sampling)[1] for _ in range(5)]
    _wait_until(lambda: engine.running > 0)
    assert engine.running <= 2 and engine.waiting >= 3
    assert len({tuple(result()) for result in results}) == 1


def test_a_failure_is_told_and_the_engine_goes_on(vlm, chat):
    engine = LocalEngine(vlm, chat, max_rows=64)
    prompt = chat.prompt(make_problem("p"))
    sampling = chat.sampling(max_new_tokens=5)
    hook = vlm.model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    events = []
    engine.submit(prompt, sampling, listener=events.append)
    _wait_until(lambda: bool(events))
    hook.remove()
    assert isinstance(events[0], ZeroDivisionError) and len(events) == 1
    assert gather(engine, prompt, sampling)[1]()[0][2] is not None


def test_a_stop_string_ends_the_answer_before_it(vlm, chat):
    engine = LocalEngine(vlm, chat, max_rows=64)
    prompt = chat.prompt(make_problem("p"))
    sampling = chat.sampling(max_new_tokens=60, seed=5)
    whole = gather(engine, prompt, sampling)[1]()[0]
    stop = whole[0][len(whole[0]) // 2 :][:3]
    assert len(stop) == 3
    text, ids, reason = gather(engine, prompt, sampling, stops=(stop,))[1]()[0]
    assert text == whole[0][: whole[0].index(stop)]
    assert reason is StopReason.EOS and len(ids) < len(whole[1])


def test_pieces_join_to_the_text_up_to_the_first_stop_string():
    text = "Ünïcode: 数学 is fun, ab abc abd END and more"
    data = text.encode()
    for width in (1, 2, 3, 5):
        tokens = [data[i : i + width] for i in range(0, len(data), width)]

        def decode(ids, tokens=tokens):
            return b"".join(tokens[i] for i in ids).decode(errors="replace")

        for stops in ((), ("END",), ("abd", "abc"), ("学 is",), ("nothing", "more and"), ("U", "Ü")):
            stream, pieces = Detokenizer(decode, stops), []
            for token in range(len(tokens)):
                pieces.append(stream.feed(token))
                if stream.stopped:
                    break
            pieces.append(stream.flush())
            cuts = [text.index(stop) for stop in stops if stop in text]
            assert "".join(pieces) == text[: min(cuts, default=len(text))]
            assert "\ufffd" not in "".join(pieces)
