"""The chat page in a real headless Chromium: upload, ask, read; two models, turns, phone, dark, keyboard."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rlcs.data import puzzles
from rlcs.errors import PromptError, UserError
from rlcs.serving import chat_page
from rlcs.serving.session import Settings
from test_server import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pieces:
    """A canned stream that remembers whether it was closed."""

    def __init__(self, pieces, *, delay=0.0):
        self._pieces, self._delay, self.closed = iter(pieces), delay, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.closed:
            raise StopIteration
        time.sleep(self._delay)
        return next(self._pieces)

    def close(self):
        self.closed = True


class Canned:
    """Talks like a reasoner; `asked` keeps every conversation it was given."""

    def __init__(self, name, text, *, delay=0.0):
        self.name, self._text, self._delay = name, text, delay
        self.asked, self.settings, self.streams = [], [], []

    def stream(self, messages, settings):
        if "too long" in str(messages):
            raise PromptError("the prompt is too long", fix="ask less")
        if "explode" in str(messages):
            raise RuntimeError("what nobody foresaw")
        self.asked.append(list(messages))
        self.settings.append(settings)
        words = [word + " " for word in self._text.split(" ")]
        self.streams.append(Pieces(words, delay=self._delay))
        return self.streams[-1]


# --- without a browser ----------------------------------------------------------------------------


def exchange(text, *answers, images=(), seconds=1.0):
    return chat_page.Exchange(text=text, images=tuple(images), answers=answers, seconds=seconds)


def test_reasoning_is_folded_and_the_answer_set_apart():
    first, thought, answer = chat_page.shown(exchange("Q?", "I count 3. \\boxed{3}"), 0)
    assert first == {"role": "user", "content": "Q?"} and answer["content"] == "**Answer:** 3"
    assert thought["content"] == "I count 3." and thought["metadata"]["status"] == "done"
    open_thought = chat_page.shown(exchange("Q?", "I cou", seconds=None), 0)[-1]
    assert open_thought["metadata"] == {"title": "Reasoning", "status": "pending"}
    for text, contents in {
        "\\boxed{3}": ["**Answer:** 3"],
        "So \\fbox{3}.": ["So", "**Answer:** 3"],
        "<think>Hm.</think>\nParis.": ["Hm.", "Paris."],
        "<think>Hm.</think>It is \\boxed{3}.": ["Hm.\nIt is", "**Answer:** 3"],
        "<think>Hm": ["<think>Hm"],
        "<think>Hm.</think>": ["Hm.", "(nothing)"],
        " ": ["(nothing)"],
    }.items():
        assert [m["content"] for m in chat_page.shown(exchange("Q?", text), 0)] == ["Q?", *contents]
    assert chat_page.shown(exchange("Q?", "No box."), 0)[-1]["content"] == "No box."
    assert chat_page.shown(exchange("Q?", "\\boxed{\\frac{1}{2}}"), 0)[-1]["content"].endswith(
        "$\\frac{1}{2}$"
    )
    pictured = chat_page.shown(exchange("", "x", images=[Path("a.png"), Path("b.png")]), 0)
    assert pictured[1]["content"].alt_text == "Image 2 of 2 of the question" and len(pictured) == 3


def test_every_model_gets_its_own_past_and_closing_stops_all():
    one, two = Canned("one", "a b c"), Canned("two", "d")
    past = [exchange("first", "said by one", "said by two"), exchange("second", "only one answered", "")]
    now = chat_page.Exchange(text="third", images=(Path("x.png"),), answers=("", ""))
    *_, last = chat_page.replies([one, two], past, now, Settings(), "Be brief.")
    assert last == ("a b c ", "d ")
    assert [m["content"] for m in two.asked[0]] == [
        ["Be brief."], ["first"], ["said by two"], [Path("x.png"), "third"],
    ]  # fmt: skip
    assert len(one.asked[0]) == 6
    running = chat_page.replies([one, two], [], now, Settings(), "")
    next(running)
    running.close()
    assert one.streams[-1].closed and two.streams[-1].closed


def test_an_answer_ends_when_it_is_settled_or_forgotten_and_keeps_what_was_said():
    model, talk = Canned("one", "a b c", delay=0.1), chat_page.Talk()
    for end, kept in ((talk.settle, "a "), (talk.forget, "")):
        talk.begin(exchange("Q?", "", seconds=None))
        running = chat_page.answer([model], talk, Settings(), "")
        assert next(running)[-1].answers == ("a ",) and talk.now.seconds is None
        end()
        end()  # twice is once
        assert "".join(each.answers[0] for each in talk.past) == kept
        *_, last = running
        assert last == talk.past and model.streams[-1].closed
    broken = chat_page.answer([Canned("one", "a")], talk, Settings(), "")
    talk.begin(exchange("too long", "", seconds=None))
    with pytest.raises(PromptError):
        next(broken)
    assert talk.now is None and talk.past[-1].text == "too long" and talk.past[-1].seconds is not None


def test_a_taken_port_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="another --port"):
            chat_page.open_page([Canned("x", "y")], host="127.0.0.1", port=taken.getsockname()[1])


# --- in the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Canned, Canned]]:
    """The page in this process with two canned models."""
    import tempfile

    base = Canned("builtin", "\\boxed{2}")
    trained = Canned(
        "runs/mine/grpo/final", "There are " + "many shapes and " * 30 + "\\boxed{5}", delay=0.02
    )
    with tempfile.TemporaryDirectory() as folder:
        page = chat_page.build([base, trained], Path(folder))
        _, url, _ = chat_page.launch(page, host="127.0.0.1", port=free_port(), wait=False)
        yield url, base, trained
        page.close()


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "shapes.png"
    path.write_bytes(puzzles.load("shapes", split="test", count=1, seed=5)[0].images[0].data)
    return path


def opened(browser, url, **options):
    """A page with a record of every request that left this machine."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(60_000)
    page.outside = []
    local = ("http://127.0.0.1", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(local) else page.outside.append(r.url))
    page.goto(url)
    page.wait_for_selector("textarea")
    return page


def ask(page, text, *images):
    if images:
        page.set_input_files("input[type=file]", [str(each) for each in images])
        page.wait_for_function(f"document.querySelectorAll('.thumbnail-item img').length >= {len(images)}")
    page.locator("textarea").first.fill(text)
    page.locator("textarea").first.press("Enter")


def shot(page, name):
    """A picture for people's eyes, where they ask for them."""
    if folder := os.environ.get("RLCS_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@needs_chromium
@pytest.mark.parametrize("look", ["desktop", "phone", "dark"])
def test_two_models_side_by_side(look, browser, served, image):
    url = served[0]
    size = {"width": 390, "height": 844} if look == "phone" else {"width": 1280, "height": 900}
    page = opened(browser, url, viewport=size, color_scheme="dark" if look == "dark" else "light")
    shot(page, f"{look}-empty")
    ask(page, "How many shapes?", image)
    left, right = page.locator(".conversation").all()
    right.get_by_text("many shapes").first.wait_for()  # it streams while it thinks
    assert right.get_by_text("Answer: 5").count() == 0
    right.get_by_text("Answer: 5").wait_for()
    left.get_by_text("Answer: 2").wait_for()
    assert right.get_by_text("Reasoning").count() == 1 and left.get_by_text("Reasoning").count() == 0
    right.get_by_text("many shapes and many").first.wait_for(state="hidden")  # folded
    alt = page.locator(".conversation img[alt^='Image 1 of 1 of the question']")
    assert alt.count() == 2
    shot(page, f"{look}-answer")
    right.get_by_text("Reasoning").click()
    right.get_by_text("many shapes and many").first.wait_for()
    shot(page, f"{look}-reasoning")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= size["width"], "the page scrolls sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, background.removeprefix("rgb(").rstrip(")").split(",")[:3])) < 200
    assert dark == (look == "dark")
    assert not page.outside and not any(each.is_visible() for each in page.get_by_title("Share").all())
    page.context.close()


@needs_chromium
def test_turns_settings_examples_and_errors(browser, served, image):
    url, base, _ = served
    page = opened(browser, url)
    page.locator("#examples button").first.click()  # an example fills the question
    page.wait_for_function("document.querySelector('textarea').value.length > 10")
    page.wait_for_selector(".thumbnail-item img")
    page.locator("textarea").first.press("Enter")
    page.locator(".conversation").last.get_by_text("Answer: 5").wait_for()
    page.get_by_text("Sampling").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("number input for Temperature (0: greedy)").fill("0.7")
    page.keyboard.press("Tab")
    ask(page, "And now?", image, image)
    page.locator(".conversation").last.get_by_text("Answer: 5").nth(1).wait_for()
    system, asked, said, again = base.asked[-1]
    assert system["content"] == ["Be brief."] and base.settings[-1].temperature == 0.7
    assert isinstance(asked["content"][0], Path) and said["content"] == ["\\boxed{2} "]
    assert len(again["content"]) == 3 and again["content"][-1] == "And now?"
    ask(page, "too long")
    page.get_by_text("ask less").wait_for()
    page.locator(".conversation").first.get_by_text("too long").wait_for()  # the question stays
    ask(page, "explode")
    page.locator(".conversation").first.get_by_text("explode").wait_for()
    page.get_by_text("New conversation").click()
    page.wait_for_function("document.querySelectorAll('.conversation .message').length == 0")
    ask(page, "Fresh start")
    page.locator(".conversation").first.get_by_text("Answer: 2").wait_for()
    assert [m["content"] for m in base.asked[-1]] == [["Be brief."], ["Fresh start"]]
    page.context.close()


@pytest.fixture
def answering(browser, served):
    """A page while the right model answers its first question, and the conversation with that model."""
    page = opened(browser, served[0])
    ask(page, "How many?")
    right = page.locator(".conversation").last
    right.get_by_text("many shapes").first.wait_for()
    yield page, right
    page.context.close()


@needs_chromium
def test_stop_keeps_what_was_said(answering, served):
    page, right = answering
    trained = served[2]
    stop = page.get_by_label("Stop")
    assert stop.inner_text() == "Stop"
    stop.click()
    right.locator("[data-testid=bot]").get_by_text("There are many shapes").wait_for()
    page.wait_for_function("!document.querySelector('.loading-spinner')")
    assert right.get_by_text("Answer:").count() == 0
    ask(page, "And now?")
    right.get_by_text("Answer: 5").wait_for()
    assert trained.streams[-2].closed
    _, said, again = trained.asked[-1]
    assert said["role"] == "assistant" and said["content"][0].startswith("There are")
    assert again["content"] == ["And now?"]


@needs_chromium
def test_buttons_are_there_while_they_have_something_to_do(browser, served):
    page = opened(browser, served[0])
    stop, restart = page.get_by_label("Stop the answer"), page.get_by_text("New conversation")
    for asking in range(3):
        stop.wait_for(state="hidden")
        assert restart.is_visible() == bool(asking % 2)
        ask(page, f"How many? {asking}")
        stop.wait_for()
        restart.wait_for()
        page.locator(".conversation").last.get_by_text("Answer: 5").nth(asking % 2).wait_for()
        stop.wait_for(state="hidden")
        if asking:
            restart.click()
            restart.wait_for(state="hidden")
    page.context.close()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_conversation_is_as_tall_as_what_it_holds(width, browser, served):
    page = opened(browser, served[0], viewport={"width": width, "height": 844})
    conversation = page.locator(".conversation").last

    def height():
        return conversation.bounding_box()["height"]

    empty = height()
    assert empty < 150, "an empty slab"
    ask(page, "How many?")
    conversation.get_by_text("Answer: 5").wait_for()
    conversation.get_by_text("many shapes and many").first.wait_for(state="hidden")  # folded
    short = height()
    assert empty < short < 400
    for number in range(1, 4):
        ask(page, f"And now? {number}")
        conversation.get_by_text("Answer: 5").nth(number).wait_for()
    assert short < height() < 600, "it scrolls from a limit on"
    last = conversation.get_by_text("Answer: 5").last
    inside = last.bounding_box()["y"] + 10 < conversation.bounding_box()["y"] + height()
    assert inside, "the newest answer is in sight"
    page.context.close()


@needs_chromium
def test_typing_elsewhere_is_not_disturbed_by_an_answer(browser, served):
    page = opened(browser, served[0])
    page.get_by_text("Sampling").click()
    prompt = page.get_by_label("System prompt")
    prompt.wait_for()
    ask(page, "How many?")
    prompt.click()
    page.keyboard.type("a long prompt " * 10, delay=10)  # the question is taken, answers begin and end
    page.locator(".conversation").last.get_by_text("Answer: 5").wait_for()
    assert prompt.input_value() == "a long prompt " * 10
    page.context.close()


@needs_chromium
def test_what_is_typed_meanwhile_is_kept_and_a_new_conversation_begins_at_once(answering, served):
    page, right = answering
    trained, box = served[2], page.locator("textarea").first
    assert box.input_value() == ""
    ask(page, "And now?")  # too early
    page.get_by_text("Wait for the answer, or press Stop.").wait_for()
    right.get_by_text("Answer: 5").wait_for()
    assert box.input_value() == "And now?"
    box.press("Enter")
    page.wait_for_function("document.querySelector('textarea').value == ''")
    right.get_by_text("And now?").wait_for()
    right.get_by_text("Reasoning").nth(1).wait_for()
    page.get_by_text("New conversation").click()
    page.wait_for_function("document.querySelectorAll('.conversation .message').length == 0")
    ask(page, "Fresh start")
    right.get_by_text("Answer: 5").wait_for()
    assert right.get_by_text("And now?").count() == 0
    assert trained.streams[-2].closed and len(trained.asked[-1]) == 1


@needs_chromium
def test_the_keyboard_suffices(browser, served):
    page = opened(browser, served[0])
    page.wait_for_selector("#question textarea:focus")
    page.keyboard.type("By keyboard")
    page.keyboard.press("Enter")
    page.locator(".conversation").last.get_by_text("Answer: 5").wait_for()
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "(document.activeElement.innerText || document.activeElement.ariaLabel || '').trim()"
            )
        )
    assert "New conversation" in seen and any("Sampling" in each for each in seen)
    assert any("What" in each for each in seen)  # the examples
    page.context.close()


@contextmanager
def commanded(*words) -> Iterator[str]:
    """`rlcs chat` as a process of its own: the page's address."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "rlcs", "chat", "--port", str(port), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(url)
                    break
                except OSError:
                    assert server.poll() is None, server.stdout.read()
                    time.sleep(0.2)
            yield url
        finally:
            server.terminate()


@needs_chromium
@pytest.mark.parametrize("where", ["here", "on a server"])
def test_the_command_with_the_builtin_model(where, browser, image):
    with ExitStack() as stack:
        words = ["--engine", "local"]
        if where == "on a server":
            port = stack.enter_context(serving("builtin")).port
            words = ["--url", f"http://127.0.0.1:{port}/v1"]
        page = opened(browser, stack.enter_context(commanded(*words)))
        ask(page, "How many squares are there?", image)
        page.locator(".conversation [data-testid=bot]").last.wait_for()
        page.wait_for_function("document.querySelector('.conversation').innerText.includes('Answer:')")
        assert page.get_by_text("builtin" if where == "here" else "m", exact=True).count()
        shot(page, f"builtin-{where.replace(' ', '-')}")
        assert not page.outside
        page.context.close()
