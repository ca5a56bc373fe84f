"""Shows one training example as the model gets it: tokens with their loss weights, image patches.

The example is built by the functions that training uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

from rlcs.data import puzzles
from rlcs.data.images import data_uri, encode
from rlcs.data.loading import load, require_usable
from rlcs.data.rows import Row
from rlcs.errors import DataError
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.source import RECIPE, part_of_run
from rlcs.model.vlm import Vlm
from rlcs.recipe.loading import list_recipes, load_recipe
from rlcs.recipe.stages import Turns
from rlcs.records import Demonstration, Prompt
from rlcs.report.pages import templates, write_page
from rlcs.storage import at_home
from rlcs.train.sft import tree_of


@dataclass(frozen=True, kw_only=True)
class View:
    """One example: tokens (T,) as text, their loss weights (T,), and the images as the model sees them.

    `controls` are the numbers of the tokens that are control tokens.
    """

    title: str
    prompt: Prompt
    tokens: tuple[str, ...]
    weights: tuple[float, ...]
    controls: frozenset[int]
    images: tuple[Image.Image, ...]
    answer: str

    @property
    def learnt(self) -> int:
        """The number of tokens with loss."""
        return sum(weight != 0 for weight in self.weights)


def look_at(what: str, overrides: Sequence[str], *, row: int) -> View:
    """Build the view of row `row` of the cold-start data of a recipe or a run, or of a data source.

    Raises DataError for a row that is missing or cannot be a prompt.
    """
    if (part := part_of_run(at_home(what))) is not None:
        what = str(part[0] / RECIPE)
    is_recipe = what in list_recipes() or Path(what).suffix in (".yaml", ".yml")
    recipe = load_recipe(what if is_recipe else "quickstart", overrides).recipe
    source = recipe.data.cold_start if is_recipe else what
    loaded = load(source, recipe.data, decode_limit=recipe.images.decode_limit, role="cold_start")
    require_usable(loaded, recipe.data)
    if row >= len(loaded.rows):
        raise DataError(
            f"there is no row {row}", where=source, fix=f"choose --row from 0 to {len(loaded.rows) - 1}"
        )
    vlm = loading.load(recipe.model)
    return make_view(
        loaded.rows[row],
        vlm,
        loading.make_chat(vlm, recipe.prompt, recipe.images),
        seed=recipe.seed,
        turns=recipe.sft.turns,
    )


def make_view(row: Row, vlm: Vlm, chat: Chat, *, seed: int = 0, turns: Turns = "all") -> View:
    """Tokenise one row as SFT does; a built-in row without a response gets one of the built-in teacher."""
    response = row.response
    if response is None and row.problem.source.startswith("builtin:"):
        response = puzzles.teach(row.problem, seed=seed, wrong_share=0.0)
    ids: tuple[int, ...] = ()
    if response is None:
        prompt = chat.checked(chat.prompt(row.problem))
        weights: tuple[float, ...] = (0.0,) * len(prompt.ids)
    else:
        tree = tree_of(Demonstration(problem=row.problem, response=response, teacher=""), chat, turns=turns)
        prompt, ids = tree.prompt, tree.branches[0].ids
        weights = (tree.trunk_weights or (0.0,) * len(prompt.ids)) + tree.branches[0].weights
    whole = (*prompt.ids, *ids)
    return View(
        title=row.problem.id,
        prompt=prompt,
        tokens=tuple(map(chat.token, whole)),
        weights=weights,
        controls=frozenset(at for at, index in enumerate(whole) if not chat.token_bytes(index)),
        images=tuple(map(chat.picture, prompt.images)),
        answer=row.problem.answer,
    )


def pieces(view: View) -> list[tuple[str, str]]:
    """The (kind, text) of each token or image: tokens with loss are `loss`, others `text` or `control`."""
    starts = {start: (end, number) for number, (start, end) in enumerate(view.prompt.spans)}
    shown: list[tuple[str, str]] = []
    at = 0
    while at < len(view.tokens):
        if at in starts:
            end, number = starts[at]
            tiles, height, width = view.prompt.grids[number]
            rows, columns = height // view.prompt.merge_size, width // view.prompt.merge_size
            shape = f"{tiles} tiles of {rows} x {columns}" if tiles > 1 else f"{rows} x {columns}"
            shown.append(("image", f"[image {number + 1}: {shape} = {end - at} tokens]"))
            at = end
            continue
        token = view.tokens[at]
        kind = "loss" if view.weights[at] else "control" if at in view.controls else "text"
        shown.append((kind, token))
        at += 1
    return shown


def print_view(view: View, console: Console | None = None) -> None:
    """Print tokens with their bounds, those with loss underlined, and images as half blocks."""
    console = console or Console(highlight=False)
    head = f"{view.title}: {len(view.tokens)} tokens, {view.learnt} with loss; gold answer {view.answer}"
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
    """An image as text for the terminal, two pixels a character."""
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
    """Write one self-contained page: the images under their token grid, and every token."""
    images = [
        _grid_uri(image, image.height * view.prompt.merge_size // height)
        for image, (_, height, _) in zip(view.images, view.prompt.grids, strict=True)
    ]
    template = templates().get_template("preview.html.j2")
    write_page(path, template.render(view=view, images=images, pieces=pieces(view)))


def _grid_uri(image: Image.Image, cell: int) -> str:
    """The image, four times as large, with lines between tokens (of `cell` pixels a side), as a data URI."""
    zoom = 4
    large = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for x in range(0, large.width, cell * zoom):
        pen.line([(x, 0), (x, large.height)], fill=(128, 128, 128), width=2)
    for y in range(0, large.height, cell * zoom):
        pen.line([(0, y), (large.width, y)], fill=(128, 128, 128), width=2)
    return data_uri(encode(large))
