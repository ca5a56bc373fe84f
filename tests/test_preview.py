"""`rlcs look` shows exactly what training gets."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from conftest import make_conversation, make_problem
from rlcs.data.rows import Row
from rlcs.errors import DataError
from rlcs.model import loading
from rlcs.recipe.schema import Model
from rlcs.records import to_row
from rlcs.report.preview import look_at, make_view, pieces, print_view, write_html


@pytest.fixture
def view(random_model_folder):
    problem = make_problem("row-1", "How many <b>apples</b>?", ((56, 84),))
    vlm = loading.load(Model(name=str(random_model_folder)))
    return make_view(Row(problem=problem, response="three \\boxed{3}"), vlm, loading.make_chat(vlm))


def test_only_the_response_and_its_end_carry_loss(view):
    learnt = "".join(token for token, weight in zip(view.tokens, view.weights, strict=True) if weight)
    assert learnt == "three \\boxed{3}<|im_end|>"
    assert [kind for kind, _ in pieces(view)].count("image") == 1
    assert ("image", "[image 1: 3 x 2 = 6 tokens]") in pieces(view)
    assert (view.images[0].width, view.images[0].height) == (56, 84)


@pytest.mark.parametrize(
    ("turns", "learnt"),
    [
        ("all", "I count two.\n\\boxed{2}<|im_end|>Three: \\boxed{3}<|im_end|>Five<|im_end|>"),
        ("last", "Five<|im_end|>"),
    ],
)
def test_all_learnt_turns_of_a_conversation_are_shown(random_model_folder, tmp_path, turns, learnt):
    folder, row = tmp_path, {"question": "Now <image>?", "answer": "5", "response": "Five"}
    images = make_conversation("talk").images
    for number, ref in enumerate(images):
        (folder / f"{number}.png").write_bytes(ref.data)
    row["history"] = [to_row(turn) for turn in make_conversation("talk").history]
    row["images"] = [f"{number}.png" for number in range(3)]
    (folder / "talk.jsonl").write_text(json.dumps(row))
    overrides = [f"model.name={random_model_folder}", f"sft.turns={turns}"]
    view = look_at(str(folder / "talk.jsonl"), overrides, row=0)
    assert "".join(t for t, weight in zip(view.tokens, view.weights, strict=True) if weight) == learnt
    assert "".join(text for kind, text in pieces(view) if kind == "loss") == learnt
    assert len(view.images) == 3


def test_the_terminal_shows_tokens_and_picture(view):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_view(view, console)
    shown = console.file.getvalue()
    assert "\u2580" in shown and "[image 1: 3 x 2 = 6 tokens]" in shown
    assert "with loss; gold answer 4" in shown


def test_data_is_not_read_as_markup(view):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_view(dataclasses.replace(view, title="[/b] :bug:", answer="[a,b]"), console)
    assert console.file.getvalue().startswith("[/b] :bug:: ") and "answer [a,b]" in console.file.getvalue()


def test_the_page_is_self_contained_and_escaped(view, tmp_path):
    write_html(view, tmp_path / "look.html")
    page = (tmp_path / "look.html").read_text()
    assert (
        "data:image/png;base64," in page
        and "<b>apples" not in page
        and "http" not in page.replace("http-equiv", "")
    )


def test_a_recipe_shows_its_cold_start_data_and_a_source_its_rows(random_model_folder):
    overrides = [f"model.name={random_model_folder}", "data.cold_start=builtin:puzzles?count=4"]
    assert "\\boxed{" in "".join(look_at("quickstart", overrides, row=1).tokens)
    assert look_at("builtin:shapes?count=3", overrides, row=2).title.startswith("shapes-")
    with pytest.raises(DataError, match="there is no row 3"):
        look_at("builtin:shapes?count=3", overrides, row=3)
