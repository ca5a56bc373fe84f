"""Every number of a recipe has bounds: a sentence names the key and its bound."""

import math
from operator import attrgetter

import pytest

from rlcs.errors import RecipeError
from rlcs.recipe.keys import allowed, recipe_keys
from rlcs.recipe.loading import changed, load_recipe
from rlcs.recipe.schema import Recipe

NUMBERS = [key for key, field in recipe_keys().items() if "number" in allowed(field)]
HUGE = ("1e30", "1e308", ".inf", "-.inf", ".nan", str(2**63), str(2**80), "-1e30", str(-(2**80)))
EDGES = ("0", "-1", "1e-45", "-0.0", "0.5", "1")
RECIPE = load_recipe("quickstart").recipe


def written(key, value):
    """The value in the form that the key takes."""
    words = allowed(recipe_keys()[key])
    if words.startswith("a list of 2"):
        return f"[{value}, {value}]"
    if words.startswith("a list"):
        return f"[{value}]"
    return f"{{mine.py:f: {value}}}" if words.startswith("a mapping") else value


@pytest.mark.fault("numbers", "each numeric key huge, infinite or NaN", "refused with the key and its bound")
@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_absurd_is_refused_with_its_bound(key):
    for value in HUGE:
        with pytest.raises(RecipeError, match=f"{key} should be .* (at most|below)") as caught:
            changed(RECIPE, [f"{key}={written(key, value)}"])
        assert len(str(caught.value)) < 600


@pytest.mark.fault(
    "numbers", "each numeric key zero, negative, tiny", "a sentence, or a number a run can use"
)
@pytest.mark.parametrize("key", NUMBERS)
def test_at_the_edges_a_value_is_refused_or_fits(key):
    for value in EDGES:
        try:
            recipe = changed(RECIPE, [f"{key}={written(key, value)}"])
        except RecipeError as error:
            assert key.split(".")[0] in str(error), error
            continue
        kept = attrgetter(key)(recipe)
        numbers = kept if isinstance(kept, tuple) else kept.values() if isinstance(kept, dict) else [kept]
        assert all(math.isfinite(number) and abs(number) <= 2**32 for number in numbers)


def test_there_are_many_numbers():
    assert len(NUMBERS) > 100 and Recipe()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sft.optimizer.lr=1e30", "sft.optimizer.lr should be a number at least 0 and at most 10"),
        ("grpo.optimizer.betas=[0.9, 1.0]", "each item a number at least 0 and below 1"),
        ("grpo.temperature=1e-45", "grpo.temperature should be a number at least 0.001"),
        ("eval.temperature=1e-45", "eval.temperature should be 0 or at least 0.001"),
        ("grpo.clip_high=1e300", "grpo.clip_high should be a number at least 0 and at most 1,000,000"),
        (f"seed={2**80}", "seed should be a whole number at least .* and at most 4,294,967,295"),
    ],
)
def test_the_sentence_names_key_and_bound(word, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", [word])
