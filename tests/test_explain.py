"""`rlcs recipes explain`: every key has a meaning, and the page of the reference is what the schema says."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlcs.cli.main import app
from rlcs.errors import RecipeError
from rlcs.recipe.explain import explain, facts_of, reference_page
from rlcs.recipe.keys import recipe_keys

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "recipe-keys.md"


def test_every_key_has_a_meaning():
    assert [facts.key for facts in facts_of(recipe_keys()) if len(facts.meaning) < 10] == []


def test_a_key_is_explained_with_default_allowed_values_and_recipes():
    lines = explain("grpo.loss_average")
    assert lines[0].startswith("grpo.loss_average: `token`: global token mean;")
    assert lines[1].split() == ["default", '"token"']
    assert lines[2].split(maxsplit=1) == ["allowed", "one of token, sequence, constant, micro_batch"]
    assert lines[3].split() == ["paper-7b", '"micro_batch"']


def test_the_default_is_that_of_a_whole_recipe():
    """Both stages have an optimiser of the same keys, with different defaults."""
    assert "1e-05" in explain("sft.optimizer.lr")[1] and "1e-06" in explain("grpo.optimizer.lr")[1]


def test_a_section_lists_its_keys():
    head, *keys = explain("grpo.kl")
    assert head.startswith("grpo.kl: A penalty")
    assert [line.split()[0] for line in keys] == ["grpo.kl.kind", "grpo.kl.coefficient"]


def test_without_a_name_every_key_is_listed():
    assert [line.split()[0] for line in explain("")] == list(recipe_keys())


def test_a_mistyped_key_gets_the_near_one():
    with pytest.raises(RecipeError, match=r"did you mean grpo\.clip_high"):
        explain("grpo.clip_hihg")


def test_the_page_of_the_reference_is_the_schema():
    shown = CliRunner().invoke(app, ["recipes", "explain", "--markdown"])
    assert shown.exit_code == 0 and shown.output == reference_page()
    again = "run `rlcs recipes explain --markdown > docs/reference/recipe-keys.md`"
    assert PAGE.read_text(encoding="utf-8") == reference_page(), again
