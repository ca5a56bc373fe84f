"""The page where people talk to a model: images, questions, reasoning in a fold-out, the answer set apart.

One conversation is held with every model on the page, so that two stand side by side on the same questions.
"""

import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from rlcs.data import puzzles
from rlcs.errors import RlcsError, UserError
from rlcs.grading.extraction import extract
from rlcs.recipe.sampling import Endpoint
from rlcs.serving.remote import RemoteSession, own_server
from rlcs.serving.session import Settings, load

Turn = Mapping[str, Any]
"""`role`, and `content`: a list of texts and image paths."""

_SECONDS_BETWEEN_UPDATES = 0.08
_EXAMPLES = 6
_VLLM_SHARE = 0.9  # of a GPU's memory, for all models on the page


class ChatModel(Protocol):
    """A model that answers on the page, wherever it runs."""

    name: str

    def stream(self, messages: Sequence[Turn], settings: Settings) -> Any:
        """The answer to a conversation: an iterator of its pieces that can be closed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A question with its images, and every model's answer; `seconds` is None until all are complete."""

    text: str
    images: tuple[Path, ...]
    answers: tuple[str, ...]
    seconds: float | None = None

    def turns(self, place: int) -> list[Turn]:
        """The turns of the conversation with one model: the question alone where it gave no answer."""
        question = {"role": "user", "content": [*self.images, *([self.text] if self.text.strip() else [])]}
        answer = {"role": "assistant", "content": [self.answers[place]]}
        return [question, answer] if self.answers[place] else [question]


def replies(
    models: Sequence[ChatModel], past: Sequence[Exchange], now: Exchange, settings: Settings, system: str
) -> Generator[tuple[str, ...]]:
    """Every model's answer so far, each time that it has grown. Closing the iterator stops them all."""
    first = [{"role": "system", "content": [system]}] if system.strip() else []
    streams: list[Any] = []
    try:
        for place, model in enumerate(models):
            before = [turn for each in past if each.answers[place] for turn in each.turns(place)]
            streams.append(model.stream([*first, *before, *now.turns(place)], settings))
        texts, updated = ("",) * len(models), 0.0
        for pieces in zip_longest(*streams, fillvalue=""):
            texts = tuple(text + piece for text, piece in zip(texts, pieces, strict=True))
            if time.monotonic() - updated > _SECONDS_BETWEEN_UPDATES:
                updated = time.monotonic()
                yield texts
        yield texts
    finally:
        for stream in streams:
            stream.close()


def shown(exchange: Exchange, place: int) -> list[dict[str, Any]]:
    """An exchange with one model as messages of the page: the question, the reasoning folded, the answer.

    Images carry alternative texts.
    """
    import gradio as gr

    count = len(exchange.images)
    contents: list[Any] = [
        gr.Image(
            str(path),
            alt_text=f"Image {number} of {count} of the question",
            show_label=False,
            buttons=["fullscreen"],
        )
        for number, path in enumerate(exchange.images, start=1)
    ]
    contents += [exchange.text] if exchange.text.strip() else []
    question = [{"role": "user", "content": content} for content in contents]
    text = exchange.answers[place]
    if exchange.seconds is None:
        thought: dict[str, Any] = {"title": "Reasoning", "status": "pending"}
        return [*question, {"role": "assistant", "content": text, "metadata": thought}]
    reasoning, final = parts_of(text)
    conclusion = {"role": "assistant", "content": final}
    if not reasoning:
        return [*question, conclusion]
    thought = {"title": "Reasoning", "status": "done", "duration": round(exchange.seconds, 1)}
    return [*question, {"role": "assistant", "content": reasoning, "metadata": thought}, conclusion]


def parts_of(text: str) -> tuple[str, str]:
    """An answer's reasoning, and what stands beside it as Markdown: the box, or what follows `</think>`.

    All that leads to a box is reasoning. Without either everything is the answer.
    """
    found = extract(text)
    if found.text is not None:
        reasoning, answer = text[: found.begins], found.text
        final = f"**Answer:** ${answer}$" if "\\" in answer else f"**Answer:** {answer}"
    else:
        reasoning, _, final = text.rpartition("</think>")
    reasoning = reasoning.replace("<think>", "").replace("</think>", "\n")
    return reasoning.strip(), final.strip() or "(nothing)"


@dataclass(slots=True)
class Talk:
    """One visitor's conversation: its past, and the exchange under way since `began`, in seconds."""

    past: tuple[Exchange, ...] = ()
    now: Exchange | None = None
    began: float = 0.0

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All of them, the one under way last."""
        return self.past if self.now is None else (*self.past, self.now)

    def begin(self, exchange: Exchange) -> None:
        """Let an exchange be under way."""
        self.now, self.began = exchange, time.monotonic()

    def settle(self) -> None:
        """End the exchange under way: the text so far is kept."""
        if self.now is not None:
            self.past += (replace(self.now, seconds=time.monotonic() - self.began),)
            self.now = None

    def forget(self) -> None:
        """Begin anew."""
        self.past, self.now = (), None


def take(talk: Talk, sent: Mapping[str, Any], count: int) -> None:
    """Take up what a visitor sent, for `count` models to answer. Raises gr.Error: then nothing changed."""
    import gradio as gr

    text, images = sent["text"], tuple(map(Path, sent["files"]))
    options: dict[str, Any] = {"duration": 5, "print_exception": False}
    if talk.now is not None:
        raise gr.Error("Wait for the answer, or press Stop.", **options)
    if not images and not text.strip():
        raise gr.Error("Write a question, or drop an image.", **options)
    talk.begin(Exchange(text=text, images=images, answers=("",) * count))


def answer(
    models: Sequence[ChatModel], talk: Talk, settings: Settings, system: str
) -> Iterator[tuple[Exchange, ...]]:
    """Answer what `talk` has taken up: its exchanges, each time that an answer has grown.

    Ends early when the exchange was settled or forgotten meanwhile. However it ends, the text so far is kept.
    Raises RlcsError.
    """
    now = talk.now
    if now is None:
        return
    try:
        with closing(replies(models, talk.past, now, settings, system)) as growing:
            for texts in growing:
                grown = replace(now, answers=texts)
                if talk.now is not now:
                    break
                talk.now = now = grown
                yield talk.exchanges
    finally:
        if talk.now is now:
            talk.settle()
    yield talk.exchanges


def example_problems(folder: Path) -> list[list[dict[str, Any]]]:
    """Built-in puzzles as examples of the page; their images are written to `folder`."""
    found = []
    for number, problem in enumerate(
        puzzles.load("puzzles", split="test", count=_EXAMPLES, seed=11), start=1
    ):
        path = folder / f"puzzle-{number}.png"
        path.write_bytes(problem.images[0].data or b"")
        found.append([{"text": problem.question_with_choices, "files": [str(path)]}])
    return found


def label(name: str) -> str:
    """A model's name for a heading: of a path its last three parts."""
    return "/".join(Path(name).parts[-3:])


_LATEX = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (
        ("$$", "$$", True),
        ("\\[", "\\]", True),
        ("\\(", "\\)", False),
        ("$", "$", False),
    )
]


def connect(
    models: Sequence[ChatModel], displays: Sequence[Any], box: Any, sampling: Any, afresh: Any
) -> None:
    """Let the parts of a page work together: inside its `with`."""
    import gradio as gr

    def send(talk: Talk, sent: Mapping[str, Any]) -> None:
        take(talk, sent, len(models))  # the box is emptied now: the next question may be typed meanwhile

    def converse(
        talk: Talk, system: str | None, temperature: float, top_p: float, longest: float
    ) -> Iterator[dict[Any, Any]]:
        try:
            settings = Settings(temperature=temperature, top_p=top_p, max_new_tokens=int(longest))
            for exchanges in answer(models, talk, settings, system or ""):
                yield views(exchanges)
        except RlcsError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def views(exchanges: Sequence[Exchange]) -> dict[Any, Any]:
        return {
            display: [message for each in exchanges for message in shown(each, place)]
            for place, display in enumerate(displays)
        }

    def stop(talk: Talk) -> dict[Any, Any]:
        talk.settle()
        return views(talk.exchanges)

    def forget(talk: Talk) -> dict[Any, Any]:
        talk.forget()
        return views(())

    talk = gr.State(Talk())
    # One function an event: of two, Gradio calls the second when the first has ended, after the answer.
    sent = box.submit(send, [talk, box], box, show_progress="hidden")
    answered = sent.success(converse, [talk, *sampling], displays, trigger_mode="multiple")
    # What fails, wherever it does, has been asked: else every further question would wait for its answer.
    answered.failure(stop, talk, displays, queue=False, show_progress="hidden")
    box.stop(stop, talk, displays, queue=False, show_progress="hidden")
    gr.on([afresh.click, *(display.clear for display in displays)], forget, talk, displays, queue=False)


def build(models: Sequence[ChatModel], folder: Path) -> Any:
    """The page as a Gradio app; `folder` takes the examples' images."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    with gr.Blocks(title="rlcs chat", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# rlcs chat\nDrop or paste images, ask, and watch the model reason.")
        with gr.Row():
            displays = [
                gr.Chatbot(
                    label=label(model.name),
                    height="55vh",
                    elem_classes="conversation",
                    latex_delimiters=_LATEX,
                    buttons=["copy"],
                    min_width=300,
                )
                for model in models
            ]
        box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="Ask about your images…",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            stop_btn=True,
            elem_id="question",
        )
        afresh = gr.Button("New conversation", size="sm", variant="secondary")
        gr.Examples(example_problems(folder), inputs=[box], label="Example problems", elem_id="examples")
        with gr.Accordion("Sampling", open=False):
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p")
            longest = gr.Slider(16, 8192, value=1024, step=16, label="Longest answer, tokens")
            system = gr.Textbox(
                value="", label="System prompt", placeholder="The one the model was trained with", lines=2
            )
        # Not `autofocus`: it takes the focus back whenever the box is emptied, in the middle of other typing.
        page.load(None, js="() => document.querySelector('#question textarea').focus()")
        connect(models, displays, box, [system, temperature, top_p, longest], afresh)
    page.queue(default_concurrency_limit=8)
    return page


def launch(page: Any, *, host: str, port: int, wait: bool) -> Any:
    """Serve a page; with `wait` until Ctrl-C. Nothing leaves the machine: no font, no count, no tunnel."""
    import gradio as gr

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        return page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            theme=theme,
            css_paths=Path(__file__).with_suffix(".css"),
            max_file_size="20mb",
            footer_links=["settings"],
            prevent_thread_lock=not wait,
            quiet=True,
        )
    except OSError as error:
        what = f"cannot listen there: {error}"
        raise UserError(what, where=f"{host}:{port}", fix="give another --port") from error


@contextmanager
def open_models(
    names: Sequence[str], *, program: str | None, url: str | None, key_env: str
) -> Iterator[list[ChatModel]]:
    """Models to talk to: names on the server at `url`, or servers, or models that vLLM or we load.

    Without names: the first that the server has, or the built-in one. Raises EndpointError, ModelError.
    """
    names = names or ["" if url else "builtin"]
    share = _VLLM_SHARE / len(names) if len(names) > 1 else None
    found: list[ChatModel] = []
    with ExitStack() as stack:
        for name in names:
            if url or name.startswith(("http://", "https://")):
                place, model = (url, name) if url else (name, "")
                found.append(RemoteSession(Endpoint(base_url=place, model=model, key_env=key_env)))
            elif program is None:
                found.append(load(name))
            else:
                sys.stdout.write(f"vLLM is starting with {name}; a minute or so\n")
                found.append(stack.enter_context(own_server(program, name, share=share)))
        yield found


def open_page(models: Sequence[ChatModel], *, host: str, port: int) -> None:
    """Serve the page of these models until Ctrl-C. Raises UserError when the port is taken."""
    with tempfile.TemporaryDirectory() as folder:
        page = build(models, Path(folder))
        sys.stdout.write(f"the page is at http://{host}:{port} (Ctrl-C ends it)\n")
        launch(page, host=host, port=port, wait=True)
