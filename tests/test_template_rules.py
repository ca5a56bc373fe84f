"""Prompts and responses of models whose chat template thinks."""

import pytest

import family_models
from conftest import make_problem
from rlcs.errors import RecipeError
from rlcs.model import loading
from rlcs.recipe.schema import Model, Prompts
from rlcs.records import Problem, Turn


@pytest.fixture(scope="module")
def random_model_folder(tmp_path_factory):
    return family_models.build("qwen3_5", tmp_path_factory.mktemp("thinking"))


def ends_of_prompts(vlm, thinking):
    chat = loading.make_chat(vlm, Prompts(system=None, thinking=thinking))
    return "".join(map(chat.token, chat.prompt(make_problem("p")).ids)).rpartition("assistant\n")[2]


def rendered(processor, **options):
    turn = [{"role": "user", "content": "q"}]
    return processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_prompts_begin_answers_as_the_template_does_and_so_does_the_saved_one(
    vlm, thinking, random_model_folder, tmp_path, caplog
):
    fresh = loading.load(Model(name=str(random_model_folder))).processor
    options = {} if thinking is None else {"enable_thinking": thinking}
    expected = rendered(fresh, **options).rpartition("assistant\n")[2]
    assert ends_of_prompts(vlm, thinking) == expected
    vlm.processor.save_pretrained(tmp_path)
    saved = type(vlm.processor).from_pretrained(tmp_path)
    assert rendered(saved) == rendered(fresh, **options) and not caplog.records
    assert rendered(saved, enable_thinking=True).endswith("<think>\n")


@pytest.mark.parametrize(
    ("response", "learnt"),
    [
        ("<think>\nr\n</think>\n\na", "r\n</think>\n\na"),
        ("<think> r</think>a", " r</think>a"),
        ("r</think>a", "r</think>a"),
        ("a", "\n</think>\n\na"),
    ],
)
def test_a_response_never_opens_the_block_twice_and_always_closes_it(vlm, response, learnt):
    chat = loading.make_chat(vlm)
    ids = chat.response_ids(response)
    assert chat.text(ids[:-1]) == learnt and ids[-1] == chat.end_id
    spoken = loading.make_chat(vlm, Prompts(thinking=False))
    assert spoken.text(spoken.response_ids("a")[:-1]) == "a"


def test_earlier_answers_keep_what_was_said_and_not_what_was_thought(vlm):
    history = (Turn(role="user", text="a"), Turn(role="assistant", text="<think>\nr\n</think>\n\nsaid"))
    problem = Problem(id="p", source="t", question="b", answer="1", history=history)
    chat = loading.make_chat(vlm, Prompts(system=None))
    text = "".join(map(chat.token, chat.prompt(problem).ids))
    assert "assistant\nsaid<|im_end|>" in text and "r\n" not in text.replace("user\n", "")


def test_a_template_that_does_not_ask_is_named():
    vlm = loading.load(Model(name="builtin"))
    with pytest.raises(RecipeError, match=r"prompt\.thinking=false"):
        loading.make_chat(vlm, Prompts(thinking=False))
