"""The page where people talk to a model: images, questions, reasoning in a fold-out, the answer set apart.

One conversation is held with every model on the page, so that two stand side by side on the same questions.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from rlcs import tasks
from rlcs.errors import RlcsError, UserError
from rlcs.serving.session import Settings, split_answer

Turn = Mapping[str, Any]
"""`role`, and `content`: a list of texts and image paths."""

_SECONDS_BETWEEN_UPDATES = 0.08
_EXAMPLES = 6


class Talker(Protocol):
    """Whoever answers on the page: a loaded model, or one on a server."""

    name: str

    def stream(self, messages: Sequence[Turn], settings: Settings) -> Iterator[str]:
        """The answer to a conversation, piece by piece."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a person sent: a question, its images, and how to answer."""

    text: str
    images: tuple[Path, ...]
    settings: Settings
    system: str = ""

    @property
    def turn(self) -> Turn:
        """It as a turn of a conversation: images first, then text."""
        return {"role": "user", "content": [*self.images, *([self.text] if self.text.strip() else [])]}


def replies(talkers: Sequence[Talker], histories: Sequence[Sequence[Turn]], asked: Asked) -> Iterator[list[str]]:
    """Every talker's answer so far, each time that one of them has grown. Closing it stops them all."""
    first = [{"role": "system", "content": [asked.system]}] if asked.system.strip() else []
    streams: list[Any] = []
    try:
        for talker, history in zip(talkers, histories, strict=True):
            streams.append(talker.stream([*first, *history, asked.turn], asked.settings))
        texts = [""] * len(talkers)
        told = 0.0
        for pieces in zip_longest(*streams, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if time.monotonic() - told > _SECONDS_BETWEEN_UPDATES:
                told = time.monotonic()
                yield texts
        yield texts
    finally:
        for stream in streams:
            stream.close()


def shown(text: str, *, seconds: float | None) -> list[dict[str, Any]]:
    """An answer as messages of the page: a fold-out of reasoning, then the answer; `seconds` once it is whole.

    A text without a box is shown as it is: there is nothing to set apart.
    """
    reasoning, answer = split_answer(text)
    if seconds is None:
        thought = {"title": "Reasoning", "status": "pending"}
        return [{"role": "assistant", "content": text, "metadata": thought}]
    if answer is None:
        return [{"role": "assistant", "content": text or "(nothing)"}]
    bold = f"${answer}$" if "\\" in answer else answer
    messages = [{"role": "assistant", "content": f"**Answer:** {bold}"}]
    if reasoning:
        thought = {"title": "Reasoning", "status": "done", "duration": round(seconds, 1)}
        messages.insert(0, {"role": "assistant", "content": reasoning, "metadata": thought})
    return messages


def question(asked: Asked) -> list[dict[str, Any]]:
    """What was asked as messages of the page, the images with alternative texts."""
    count = len(asked.images)
    pictures = [
        {"path": str(path), "alt_text": f"Image {number} of {count} of the question: {path.name}"}
        for number, path in enumerate(asked.images, start=1)
    ]
    contents = [*pictures, *([asked.text] if asked.text.strip() else [])]
    return [{"role": "user", "content": content} for content in contents]


def conversation(talkers: Sequence[Talker]) -> Any:
    """The function behind the page: (input, displays and histories, settings) to their next states."""

    def converse(sent: Any, system: str, temperature: float, top_p: float, longest: float, *kept: Any) -> Any:
        import gradio as gr

        displays, histories = kept[: len(talkers)], kept[len(talkers) :]
        settings = Settings(temperature=temperature, top_p=top_p, max_new_tokens=int(longest))
        images = tuple(Path(file) for file in sent["files"])
        asked = Asked(text=sent["text"], images=images, settings=settings, system=system)
        if not images and not asked.text.strip():
            raise gr.Error("Write a question, or drop an image.", duration=5)
        started, texts = time.monotonic(), [""] * len(talkers)

        def state(seconds: float | None) -> list[Any]:
            open_turns = zip(displays, texts, strict=True)
            pages = [[*old, *question(asked), *shown(text, seconds=seconds)] for old, text in open_turns]
            said = [[asked.turn, {"role": "assistant", "content": [text]}] if text else [] for text in texts]
            return [*pages, *([*old, *new] for old, new in zip(histories, said, strict=True))]

        try:
            for texts in replies(talkers, histories, asked):
                yield state(None)
        except RlcsError as error:
            raise gr.Error(str(error), duration=None) from error
        yield state(time.monotonic() - started)

    return converse


def example_problems(folder: Path) -> list[list[dict[str, Any]]]:
    """Built-in puzzles as examples of the page; their images are written to `folder`."""
    found = []
    for number, problem in enumerate(tasks.load("puzzles", split="test", count=_EXAMPLES, seed=11), start=1):
        path = folder / f"puzzle-{number}.png"
        path.write_bytes(problem.images[0].data or b"")
        found.append([{"text": problem.asked, "files": [str(path)]}])
    return found


_CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
footer { opacity: 0.7; }
"""
_LATEX = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]


def build(talkers: Sequence[Talker], folder: Path) -> Any:
    """The page as a Gradio app; `folder` takes the examples' images."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    with gr.Blocks(title="rlcs chat", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# rlcs chat\nDrop or paste images, ask, and watch the model reason.")
        histories = [gr.State([]) for _ in talkers]
        with gr.Row():
            displays = [
                gr.Chatbot(
                    label=talker.name, height="55vh", latex_delimiters=_LATEX, buttons=["copy"], min_width=300
                )
                for talker in talkers
            ]
        box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="Ask about your images…",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            stop_btn=True,
            autofocus=True,
        )
        afresh = gr.Button("New conversation", size="sm", variant="secondary")
        gr.Examples(example_problems(folder), inputs=[box], label="Example problems")
        with gr.Accordion("Sampling", open=False):
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p")
            longest = gr.Slider(16, 8192, value=1024, step=16, label="Longest answer, tokens")
            system = gr.Textbox(label="System prompt", placeholder="The one the model was trained with", lines=2)
        outputs = [*displays, *histories]
        under_way = box.submit(
            conversation(talkers), [box, system, temperature, top_p, longest, *outputs], outputs
        )
        box.submit(lambda: None, None, box, queue=False)
        box.stop(None, cancels=[under_way])
        afresh.click(lambda: [[] for _ in outputs], None, outputs, cancels=[under_way])
    page.queue(default_concurrency_limit=8)
    return page


def open_page(talkers: Sequence[Talker], *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C. Raises UserError when the port is taken."""
    with tempfile.TemporaryDirectory() as folder:
        page = build(talkers, Path(folder))
        import gradio as gr

        fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # none from elsewhere
        theme = gr.themes.Soft(font=fonts[0], font_mono=fonts[1])
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                theme=theme,
                css=_CSS,
                max_file_size="20mb",
                footer_links=["settings"],
                show_error=True,
            )
        except OSError as error:
            raise UserError(f"cannot listen there: {error}", where=f"{host}:{port}", fix="give another --port") from error
