"""The prompts of a run are checked before it trains, by the sizes of images alone."""

import json
import random
from dataclasses import replace
from unittest.mock import patch

import pytest
from PIL import Image

from rlcs.data.loading import load
from rlcs.data.run_data import load_run_data
from rlcs.errors import DataError, UserError
from rlcs.model.loading import load_chat
from rlcs.pipeline.data_checks import check_prompts, count_prompts, long_prompts, sight_notes
from rlcs.pipeline.study import Output, Study
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Data
from rlcs.signals import StopFlag
from rlcs.storage import read_json


@pytest.fixture
def charts(tmp_path):
    """A maker of JSONL files with charts of the given sizes."""

    def write(name, sizes, **more):
        rows = []
        for index, (width, height) in enumerate(sizes):
            file = tmp_path / f"{name}-{index}.png"
            Image.new("RGB", (width, height), (index, 1, ord(name))).save(file)
            rows.append({"question": f"{name} {index}?", "answer": "1", "images": [file.name], **more})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def recipe_of(*words):
    return load_recipe("quickstart", words).recipe


def test_prompts_are_counted_as_they_will_be_made(charts):
    rng = random.Random(1)
    source = charts("a", [(rng.randrange(8, 1500), rng.randrange(8, 1500)) for _ in range(30)])
    rows = load(source, Data(), decode_limit=10**7, role="rl").rows
    recipe = recipe_of("prompt.max_tokens=4096")
    chat = load_chat(recipe.model, recipe.prompt, recipe.images)
    counted = [len(chat.with_limit(9999).prompt(row.problem).ids) for row in rows]
    assert counted == [len(chat.prompt(row.problem).ids) for row in rows]
    limit = sorted(counted)[20]
    bad, longest = long_prompts(rows, chat, limit)
    assert len(bad) == sum(count > limit for count in counted) and longest == max(counted)
    assert f"the limit is {limit}" in bad[0].reason and bad[0].where.startswith(source)


def test_no_image_is_decoded(charts, monkeypatch):
    rows = load(charts("a", [(640, 480)]), Data(), decode_limit=10**7, role="rl").rows
    monkeypatch.setattr("rlcs.model.images.open_image", lambda *_, **__: pytest.fail("decoded"))
    [bad], longest = count_prompts(rows, "rl", recipe_of())
    assert f"the prompt has {longest} tokens, " in bad.reason and "the limit is 256" in bad.reason


def test_each_role_is_counted_with_its_own_system_prompt(charts):
    rows = load(charts("a", [(28, 28)]), Data(), decode_limit=10**7, role="rl").rows
    recipe = recipe_of(f"prompt.rl_system={'word ' * 400}")
    assert len(count_prompts(rows, "rl", recipe)[0]) == 1 and not count_prompts(rows, "test", recipe)[0]


def test_a_reward_for_sight_needs_images(charts, tmp_path):
    rows = load(charts("a", [(28, 28)] * 3), Data(), decode_limit=10**7, role="rl").rows
    pictured = [row.problem for row in rows]
    blind = [replace(problem, images=()) for problem in pictured]
    recipe = recipe_of("grpo.sight.coefficient=0.01")
    assert sight_notes(pictured, recipe) == sight_notes([], recipe) == sight_notes(blind, recipe_of()) == []
    [note] = sight_notes([*pictured, *blind], recipe)
    assert note.startswith("warning: grpo.sight has no effect on 3 of 6 problems of data.rl (50%)")
    with pytest.raises(DataError, match=r"grpo.sight.coefficient=0.01: no problem of data.rl has an image"):
        sight_notes(blind, recipe)


def test_a_few_long_prompts_are_left_out_of_training_and_many_are_refused(charts):
    small, large = [(56, 56)] * 9, [(640, 480)]
    words = [
        f"data.cold_start={charts('c', small + large, response='so it is 1')}",
        f"data.rl={charts('r', small + large * 2)}",
        f"data.test={charts('t', small + large)}",
    ]
    recipe = recipe_of(*words, "data.max_bad_share=0.2")
    data = load_run_data(recipe.study, recipe.data, decode_limit=10**7)
    checked = check_prompts(data, recipe)
    assert (len(checked.cold_start), len(checked.rl), len(checked.test)) == (9, 9, 10)
    assert [note.partition(":")[0] for note in checked.notes] == [
        "left out of cold_start", "left out of rl", "count as wrong in test",
    ]  # fmt: skip
    facts = checked.checks["sources"]["rl"]
    assert facts["prompts_too_long"] == 2 and facts["longest_prompt"] > 256
    strict = recipe_of(*words, "data.max_bad_share=0.15")
    with pytest.raises(DataError) as caught:
        check_prompts(data, strict)
    message = str(caught.value)
    assert (
        "2 of 11 rows cannot become prompts (allowed: 15.0%)" in message
        and "data.max_bad_share=0.19" in message
    )
    enough = facts["longest_prompt"]
    assert f"set prompt.max_tokens={enough}" in message
    with pytest.raises(DataError, match=r"(?s)cold_start: 1 of 10 .*rl: 2 of 11 .*test: 1 of 10 "):
        check_prompts(data, recipe_of(*words))
    assert len(check_prompts(data, recipe_of(*words, f"prompt.max_tokens={enough}")).rl) == 11


def test_a_run_shows_and_keeps_what_its_checks_found(charts, tmp_path, capsys):
    words = [
        f"data.cold_start={charts('c', [(28, 28)] * 3, response='so it is 1')}",
        f"data.rl={charts('t', [(56, 56)] * 3)}",
        f"data.test={tmp_path / 't.jsonl'}",
    ]
    recipe = recipe_of(*words)
    data = load_run_data(recipe.study, recipe.data, decode_limit=10**7)
    study = Study(recipe, tmp_path / "run", data=data, output=Output(quiet=True), stop=StopFlag())
    with patch.object(Study, "try_stages", side_effect=UserError("far enough")), pytest.raises(UserError):
        study.run()
    facts = read_json(tmp_path / "run" / "data_checks.json")
    assert facts["sources"]["test"]["prompts_too_long"] == 0 and facts["overlap"]["found"][0]["rows"] == 3
    shown = capsys.readouterr().out
    assert "3 of 3 rows of rl are also in test" in shown
