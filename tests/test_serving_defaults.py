"""What a model's folder says about sampling, and what a served request without settings then gets."""

import json
import shutil

import httpx
import pytest

from bench.hostile import serving
from rlcs.serving.defaults import SamplingDefaults, defaults_of, read_defaults


@pytest.mark.parametrize(
    ("config", "temperature", "top_p", "max_tokens", "ignored"),
    [
        ({}, 1.0, 1.0, None, ()),
        ({"_from_model_config": True, "eos_token_id": [1, 2]}, 1.0, 1.0, None, ()),
        ({"do_sample": False}, 0.0, 1.0, None, ()),
        ({"do_sample": False, "temperature": 0.7, "top_k": 0}, 0.0, 1.0, None, ()),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}, 0.7, 0.8, None, ("top_k 20",)),
        ({"temperature": 1e-6, "repetition_penalty": 1.05}, 1e-6, 1.0, None, ("repetition_penalty 1.05",)),
        ({"repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "max_new_tokens": 2048}, 1.0, 1.0, 2048, ()),
        ({"temperature": None, "top_p": None}, 1.0, 1.0, None, ()),
        ({"temperature": 5, "top_p": 0}, 1.0, 1.0, None, ("temperature 5", "top_p 0")),
        ({"temperature": "hot", "max_new_tokens": 0}, 1.0, 1.0, None, ("temperature hot",)),
    ],
)
def test_a_folder_says_how_to_sample(config, temperature, top_p, max_tokens, ignored):
    found = read_defaults(config)
    assert (found.temperature, found.top_p, found.max_tokens) == (temperature, top_p, max_tokens)
    assert found.ignored == ignored and all(each in str(found) for each in ignored)


def test_a_folder_without_a_word_has_the_defaults_of_the_protocol(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert defaults_of(str(tmp_path)) == read_defaults({})
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert defaults_of(str(tmp_path)).temperature == 0
    (tmp_path / "generation_config.json").write_text("no JSON")
    assert defaults_of(str(tmp_path)) == read_defaults({})


def test_a_request_without_settings_gets_those_of_the_folder(random_model_folder, tmp_path):
    folder = tmp_path / "greedy"
    shutil.copytree(random_model_folder, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "max_new_tokens": 7}))
    with serving(folder) as server:

        def ask(**settings):
            body = {"messages": [{"role": "user", "content": "How many?"}], **settings}
            url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
            choice = httpx.post(url, json=body, timeout=60).json()["choices"][0]
            return choice["message"]["content"], choice["finish_reason"]

        greedy = ask(temperature=0, max_tokens=7)
        assert greedy[1] == "length", "the test would not see a limit"
        assert ask() == ask() == greedy
        assert ask(temperature=None, top_p=None, max_tokens=None) == greedy
        assert ask(temperature=1.5, seed=1) != greedy
        assert len(ask(max_tokens=30)[0]) > len(greedy[0])


def test_a_model_of_a_run_answers_as_it_was_measured(tmp_path):
    """And so as its export does, whatever its own generation_config.json says."""
    stage = tmp_path / "run" / "sft"
    (stage / "final").mkdir(parents=True)
    (stage / "final" / "config.json").write_text("{}")
    (stage / "done.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text("eval: {temperature: 0.5, top_p: 0.9, max_new_tokens: 77}")
    expected = SamplingDefaults(temperature=0.5, top_p=0.9, max_tokens=77)
    assert defaults_of(str(stage / "final"), {"do_sample": False}) == expected
    assert defaults_of(str(stage)) == expected
