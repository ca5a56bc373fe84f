"""Web page to chat with models: images, questions, reasoning in a fold-out, the answer below it.

A question goes to every model on the page, so that their answers stand side by side.
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

from rlcs.data.decoder import ImageDecoder
from rlcs.errors import RlcsError, UserError
from rlcs.grading.extraction import extract
from rlcs.recipe.sampling import Endpoint
from rlcs.serving.example_problems import example_problems
from rlcs.serving.remote import RemoteSession, open_vllm
from rlcs.serving.session import Settings, load

Turn = Mapping[str, Any]
"""`role`, and `content`: a list of texts and image paths."""

_SECONDS_BETWEEN_UPDATES = 0.08
_ON_LOAD = """() => {
    document.querySelector("#question textarea").focus();
    const label = () => {
        const stop = document.querySelector("#stop");
        stop ? stop.setAttribute("aria-label", "Stop the answer") : setTimeout(label, 50);
    };
    label();
}"""
"""Gradio's `autofocus` would take the focus whenever the box is cleared, even while the user types elsewhere;
its buttons have no parameter for a label, and may be
made after the page has loaded."""
_VLLM_SHARE = 0.9  # of a GPU's memory, for all models on the page


class ChatModel(Protocol):
    """A model on the page, in this process or on a server."""

    name: str

    def stream(self, messages: Sequence[Turn], settings: Settings) -> Any:
        """Answer a conversation: an iterator of pieces that can be closed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A question with its images, and every model's answer; `seconds` is None until all are complete."""

    text: str
    images: tuple[Path, ...]
    answers: tuple[str, ...]
    seconds: float | None = None

    def turns(self, index: int) -> list[Turn]:
        """The turns with the model at `index`: the question alone where it gave no answer."""
        question = {"role": "user", "content": [*self.images, *([self.text] if self.text.strip() else [])]}
        answer = {"role": "assistant", "content": [self.answers[index]]}
        return [question, answer] if self.answers[index] else [question]


def replies(
    models: Sequence[ChatModel], past: Sequence[Exchange], now: Exchange, settings: Settings, system: str
) -> Generator[tuple[str, ...]]:
    """Yield every model's answer so far, each time that one grows. Closing the iterator stops all models."""
    first = [{"role": "system", "content": [system]}] if system.strip() else []
    streams: list[Any] = []
    try:
        for index, model in enumerate(models):
            before = [turn for old in past if old.answers[index] for turn in old.turns(index)]
            streams.append(model.stream([*first, *before, *now.turns(index)], settings))
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


def shown(exchange: Exchange, index: int) -> list[dict[str, Any]]:
    """Convert an exchange with one model to messages of the page: question, folded reasoning, answer.

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
    text = exchange.answers[index]
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
    """Split an answer into its reasoning and its result as Markdown: the box, or the text after `</think>`.

    All text before a box is reasoning. Without a box or `</think>` the whole text is the result.
    """
    box = extract(text)
    if box.text is not None:
        reasoning, answer = text[: box.begins], box.text
        final = f"**Answer:** ${answer}$" if "\\" in answer else f"**Answer:** {answer}"
    else:
        reasoning, _, final = text.rpartition("</think>")
    reasoning = reasoning.replace("<think>", "").replace("</think>", "\n")
    return reasoning.strip(), final.strip() or "(nothing)"


@dataclass(slots=True)
class Talk:
    """One visitor's conversation: past exchanges, and the one under way since `began` (monotonic seconds)."""

    past: tuple[Exchange, ...] = ()
    now: Exchange | None = None
    began: float = 0.0

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All exchanges, the one under way last."""
        return self.past if self.now is None else (*self.past, self.now)

    def begin(self, exchange: Exchange) -> None:
        """Start an exchange."""
        self.now, self.began = exchange, time.monotonic()

    def settle(self) -> None:
        """End the exchange under way with the text so far."""
        if self.now is not None:
            self.past += (replace(self.now, seconds=time.monotonic() - self.began),)
            self.now = None

    def forget(self) -> None:
        """Remove all exchanges."""
        self.past, self.now = (), None


def take(talk: Talk, sent: Mapping[str, Any], count: int) -> None:
    """Start an exchange with a visitor's message, for `count` models. Raises gr.Error and changes nothing."""
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
    """Answer the exchange under way; yields all exchanges each time that an answer grows.

    Ends early when the exchange was settled or removed meanwhile. The text so far is always kept. Raises
    RlcsError.
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


_LATEX = [
    {"left": left, "right": right, "display": left in ("$$", "\\[")}
    for left, right in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts of a page that take part in its events (Gradio components)."""

    displays: Sequence[Any]
    box: Any
    stop: Any
    restart: Any
    sampling: Sequence[Any]


def connect(models: Sequence[ChatModel], parts: Parts) -> None:
    """Connect the events of a page's parts; call it inside the page's `with`."""
    import gradio as gr

    displays, box = parts.displays, parts.box

    def send(talk: Talk, sent: Mapping[str, Any]) -> dict[Any, Any]:
        take(talk, sent, len(models))
        return {box: None, **buttons(talk)}  # clears the box at once, for the next question

    def converse(
        talk: Talk, system: str | None, temperature: float, top_p: float, longest: float
    ) -> Iterator[dict[Any, Any]]:
        try:
            settings = Settings(temperature=temperature, top_p=top_p, max_new_tokens=int(longest))
            for exchanges in answer(models, talk, settings, system or ""):
                yield views(exchanges)
            yield buttons(talk)
        except RlcsError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def views(exchanges: Sequence[Exchange]) -> dict[Any, Any]:
        return {
            display: [message for exchange in exchanges for message in shown(exchange, index)]
            for index, display in enumerate(displays)
        }

    def buttons(talk: Talk) -> dict[Any, Any]:
        """Each button is there while it has something to do."""
        return {
            parts.stop: gr.update(visible=True if talk.now else "hidden"),
            parts.restart: gr.update(visible=True if talk.exchanges else "hidden"),
        }

    def stop(talk: Talk) -> dict[Any, Any]:
        talk.settle()
        return views(talk.exchanges) | buttons(talk)

    def forget(talk: Talk) -> dict[Any, Any]:
        talk.forget()
        return views(()) | buttons(talk)

    talk, changing = gr.State(Talk()), [*displays, parts.stop, parts.restart]
    # One function an event: of two, Gradio would call the second only after the answer.
    sent = box.submit(send, [talk, box], [box, parts.stop, parts.restart], show_progress="hidden")
    answered = sent.success(
        converse, [talk, *parts.sampling], changing, trigger_mode="multiple", show_progress_on=displays
    )
    # End a failed exchange: otherwise the page would refuse every further question.
    answered.failure(stop, talk, changing, queue=False, show_progress="hidden")
    parts.stop.click(stop, talk, changing, queue=False, show_progress="hidden")
    gr.on(
        [parts.restart.click, *(display.clear for display in displays)], forget, talk, changing, queue=False
    )


def build(models: Sequence[ChatModel], folder: Path) -> Any:
    """Make the page as a Gradio app; the examples' images are written to `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    with gr.Blocks(title="rlcs chat", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# rlcs chat\nDrop or paste images, ask, and watch the model reason.")
        with gr.Row():
            displays = [
                gr.Chatbot(
                    label="/".join(Path(model.name).parts[-3:]),
                    height="auto",
                    placeholder="Ask below. The reasoning is folded, the result stands under it.",
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
            elem_id="question",
        )
        with gr.Row(elem_id="controls"):
            stop = gr.Button("Stop", size="sm", variant="stop", visible="hidden", elem_id="stop")
            restart = gr.Button("New conversation", size="sm", visible="hidden")
        if examples := example_problems([model.name for model in models], folder):
            rows = [[{"text": text, "files": files}] for text, files in examples]
            gr.Examples(rows, inputs=[box], label="Example problems", elem_id="examples")
        with gr.Accordion("Sampling", open=False):
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p")
            longest = gr.Slider(16, 8192, value=1024, step=16, label="Longest answer, tokens")
            system = gr.Textbox(
                value="", label="System prompt", placeholder="The one the model was trained with", lines=2
            )
        page.load(None, js=_ON_LOAD)
        sampling = [system, temperature, top_p, longest]
        connect(models, Parts(displays=displays, box=box, stop=stop, restart=restart, sampling=sampling))
    page.queue(default_concurrency_limit=8)
    return page


def launch(page: Any, *, host: str, port: int, wait: bool) -> Any:
    """Serve a page; with `wait` until Ctrl-C. No remote fonts, no usage statistics, no public tunnel."""
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
    """Open models: by name on the server at `url`, servers by URL, or models loaded here or by vLLM.

    Without names: the server's first model, or the built-in one. Raises EndpointError, ModelError.
    """
    names = names or ["" if url else "builtin"]
    share = _VLLM_SHARE / len(names) if len(names) > 1 else None
    models: list[ChatModel] = []
    with ExitStack() as stack:
        decoder = stack.enter_context(ImageDecoder())
        for name in names:
            if url or name.startswith(("http://", "https://")):
                address, model = (url, name) if url else (name, "")
                models.append(RemoteSession(Endpoint(base_url=address, model=model, key_env=key_env)))
            elif program is None:
                models.append(load(name, decoder=decoder))
            else:
                sys.stdout.write(f"vLLM is starting with {name}; a minute or so\n")
                models.append(stack.enter_context(open_vllm(program, name, share=share)))
        yield models


def open_page(models: Sequence[ChatModel], *, host: str, port: int) -> None:
    """Serve the page of these models until Ctrl-C. Raises UserError when the port is taken."""
    with tempfile.TemporaryDirectory() as folder:
        page = build(models, Path(folder))
        sys.stdout.write(f"the page is at http://{host}:{port} (Ctrl-C ends it)\n")
        launch(page, host=host, port=port, wait=True)
