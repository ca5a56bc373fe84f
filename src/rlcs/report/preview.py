"""What the model sees of one training example: tokens with their loss weights, image patches.

The example is built by the very functions that training uses: nothing is rendered a second way.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

from rlcs.data import puzzles
from rlcs.data.loading import load, require_usable
from rlcs.data.rows import BadRow, Row
from rlcs.errors import DataError
from rlcs.model import loading
from rlcs.recipe.loading import list_recipes, load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.records import Demonstration, Prompt
from rlcs.storage import atomic_write, open_image
from rlcs.train.sft import tree_of


@dataclass(frozen=True, kw_only=True)
class View:
    """One example: tokens (T,) as text, their loss weights (T,), and the images as they are resized.

    `cell` pixels along each side of a resized image make one token.
    """

    title: str
    prompt: Prompt
    tokens: tuple[str, ...]
    weights: tuple[float, ...]
    images: tuple[Image.Image, ...]
    cell: int
    answer: str


def look_at(what: str, overrides: Sequence[str], *, row: int) -> View:
    """Build the view of row `row` of a recipe's cold-start data, or of a data source.

    Raises DataError for a row that is not there or cannot be a prompt.
    """
    is_recipe = what in list_recipes() or Path(what).suffix in (".yaml", ".yml")
    recipe = load_recipe(what if is_recipe else "quickstart", overrides).recipe
    source = recipe.data.cold_start if is_recipe else what
    loaded = load(source, recipe.data, decode_limit=recipe.images.decode_limit, role="cold_start")
    require_usable(loaded, recipe.data)
    if row >= len(loaded.rows):
        raise DataError(
            f"there is no row {row}", where=source, fix=f"choose --row from 0 to {len(loaded.rows) - 1}"
        )
    return make_view(loaded.rows[row], recipe)


def no_prompts(rows: Sequence[Row], recipe: Recipe) -> list[BadRow]:
    """The rows that cannot become a prompt of the recipe's model, most often because they are too long."""
    chat = loading.load_chat(recipe.model, recipe.prompt, recipe.images)
    bad = []
    for row in rows:
        try:
            chat.prompt(row.problem)
        except DataError as error:
            bad.append(BadRow(where=row.problem.source, id=row.problem.id, reason=error.what))
    return bad


def make_view(row: Row, recipe: Recipe) -> View:
    """Tokenise one row as SFT would; a row without a response shows its teacher's, if it is built in."""
    vlm = loading.load(recipe.model)
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    response = row.response
    if response is None and row.problem.source.startswith("builtin:"):
        response = puzzles.teach(row.problem, seed=recipe.seed, wrong_share=0.0)
    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    if response is None:
        prompt = chat.prompt(row.problem)
    else:
        tree = tree_of(Demonstration(problem=row.problem, response=response, teacher=""), chat)
        prompt, ids, weights = tree.prompt, tree.branches[0].ids, tree.branches[0].weights
    images = []
    patch = vlm.processor.image_processor.patch_size
    for ref, (_, height, width) in zip(prompt.images, prompt.grids, strict=True):
        picture = open_image(ref, limit=recipe.images.decode_limit)
        images.append(picture.resize((width * patch, height * patch), Image.Resampling.BICUBIC))
    return View(
        title=row.problem.id,
        prompt=prompt,
        tokens=tuple(chat.token(i) for i in (*prompt.ids, *ids)),
        weights=(0.0,) * len(prompt.ids) + weights,
        images=tuple(images),
        cell=patch * prompt.merge_size,
        answer=row.problem.answer,
    )


def pieces(view: View) -> list[tuple[str, str]]:
    """(kind, text) of what is shown: `text` and `control` carry no loss, `loss` does, `image` is a span."""
    starts = {start: (end, number) for number, (start, end) in enumerate(view.prompt.spans)}
    shown: list[tuple[str, str]] = []
    at = 0
    while at < len(view.tokens):
        if at in starts:
            end, number = starts[at]
            _, height, width = view.prompt.grids[number]
            rows, columns = height // view.prompt.merge_size, width // view.prompt.merge_size
            shown.append(("image", f"[image {number + 1}: {rows} x {columns} = {end - at} tokens]"))
            at = end
            continue
        token = view.tokens[at]
        kind = "loss" if view.weights[at] else "control" if token.startswith("<|") else "text"
        shown.append((kind, token))
        at += 1
    return shown


def print_view(view: View, console: Console | None = None) -> None:
    """To the terminal: tokens with their bounds, those with loss underlined, images as half blocks."""
    console = console or Console(highlight=False)
    learnt = sum(weight != 0 for weight in view.weights)
    head = f"{view.title}: {len(view.tokens)} tokens, {learnt} with loss; gold answer {view.answer}"
    console.print(head, markup=False, emoji=False)  # an answer like [a,b] is no markup
    for image in view.images:
        console.print(_half_blocks(image))
    styles = {"text": "dim", "control": "magenta", "loss": "bold green underline", "image": "cyan"}
    text = Text()
    for kind, token in pieces(view):
        text.append(token.replace("\n", "\\n\n"), style=styles[kind])
        text.append("|", style="dim")
    console.print(text)
    console.print("bold green underlined: learnt; dim: given; magenta: control ids")


def _half_blocks(image: Image.Image, width: int = 48) -> Text:
    """An image in the terminal, two pixels a character cell."""
    height = max(2, round(width * image.height / image.width / 2) * 2)
    small = image.resize((width, height))
    text = Text()
    for y in range(0, height, 2):
        for x in range(width):
            top, bottom = small.getpixel((x, y)), small.getpixel((x, y + 1))
            text.append("\u2580", style=f"rgb{_rgb(top)} on rgb{_rgb(bottom)}")
        text.append("\n")
    return text


def _rgb(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    return "({},{},{})".format(*pixel)


def write_html(view: View, path: Path) -> None:
    """One self-contained page: the resized images under their token grid, and every token."""
    pictures = "".join(
        f'<img alt="image {i + 1} as the model sees it" src="{_grid_uri(image, view.cell)}">'
        for i, image in enumerate(view.images)
    )
    tokens = "".join(
        f'<span class="{kind}">{escape(token).replace(chr(10), "&#9166;<br>")}</span>'
        for kind, token in pieces(view)
    )
    learnt = sum(weight != 0 for weight in view.weights)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(view.title)}</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.9 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-height: 16rem; margin: 0 1rem 1rem 0; image-rendering: pixelated; }}
span {{ border: 1px solid #8885; border-radius: 3px; padding: 0 2px; margin: 1px; white-space: pre-wrap; }}
.loss {{ background: #2e9e5b40; font-weight: 600; }} .control {{ color: #b14fc5; }}
.image {{ color: #2a8fb5; }}
</style><h1>{escape(view.title)}</h1>
<p>{len(view.tokens)} tokens; the {learnt} filled ones carry loss. Gold answer: {escape(view.answer)}.
One cell of the grid is one image token.</p>{pictures}<p>{tokens}</p></html>"""
    atomic_write(path, page)


def _grid_uri(image: Image.Image, cell: int) -> str:
    """The image, four times as large, with a line between tokens, as a data URI."""
    zoom = 4
    large = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for x in range(0, large.width, cell * zoom):
        pen.line([(x, 0), (x, large.height)], fill=(128, 128, 128))
    for y in range(0, large.height, cell * zoom):
        pen.line([(0, y), (large.width, y)], fill=(128, 128, 128))
    buffer = io.BytesIO()
    large.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
