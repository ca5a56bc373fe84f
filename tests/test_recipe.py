"""The recipe: what is read, what is refused and in which words, and the table before a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcs.errors import RecipeError
from rlcs.recipe.keys import allowed, nearest, recipe_keys
from rlcs.recipe.loading import differences, dump, list_recipes, load_recipe
from rlcs.recipe.reading import parse, write
from rlcs.recipe.schema import Recipe
from rlcs.recipe.table import summary_rows


def _file(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _refusal(name_or_path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_weights_that_learn_are_exact_unless_told_otherwise():
    def learner(*words: str) -> tuple[str, str]:
        recipe = load_recipe("quickstart", words).recipe
        return recipe.learner.dtype, dict(summary_rows(recipe))["model"]

    assert learner()[0] == "float32", "a GPU would take bfloat16, which loses the steps of RL"
    assert learner("lora.rank=8")[0] == "auto", "the weights are frozen"
    dtype, told = learner("model.dtype=bfloat16")
    assert dtype == "bfloat16" and "loses small steps" in told
    assert "loses" not in learner("model.dtype=bfloat16", "lora.rank=8")[1] + learner()[1]


# --- reading YAML -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E3", 1000.0), (".5", 0.5), ("3.", 3.0), ("-2", -2), ("1_204_224", 1_204_224),
        ("010", 10), ("07", 7), ("0x1F", 31), ("0o17", 15), (".5e-5", 5e-6), ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"), ("no", "no"), ("on", "on"),
        ("true", True), ("~", None), ("null", None), ("none", "none"), ("'1e-5'", "1e-5"), ('"null"', "null"),
        ("", None), ("[1, a, [2.5]]", [1, "a", [2.5]]), ("{kind: k3, coefficient: 1e-2}",
                                                         {"kind": "k3", "coefficient": 0.01}),
    ],
)  # fmt: skip
def test_plain_values_mean_what_they_look_like(text: str, value: object) -> None:
    read = parse(text, where="here").value
    assert read == value
    assert type(read) is type(value)


def test_lines_are_remembered() -> None:
    parsed = parse("sft:\n  # a remark\n  epochs: 2\ngrpo: {steps: 3}\n", where="here")
    assert parsed.lines == {("sft",): 1, ("sft", "epochs"): 3, ("grpo",): 4, ("grpo", "steps"): 4}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a is given twice, first on line 1"),
        ("g:\n  x: 1\n  x: 2", 3, "g.x is given twice"),
        ("a: &me [*me]", 1, "alias"),
        ("a: &x 1\nb: *x", 1, "alias"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        ("a: 1\nb: !!str 3", 2, "tag"),
        ("? [a]\n: 1", 1, "a key must be a word"),
        ("a: 1\nb: [1,", 2, "not valid YAML"),
        ("a:\n\tb: 1", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2", 2, "not valid YAML"),
        ("a: 1\nb: " + "9" * 5000, 2, "a number of 5,000 digits"),
    ],
)
def test_flawed_yaml_is_refused_with_its_line(text: str, line: int, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, where="mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml:{line}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 3000, "[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000])
def test_yaml_without_end_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse(text, where="here")


def test_text_of_many_digits_comes_back() -> None:
    assert parse(write({"a": "9" * 5000}), where="here").value == {"a": "9" * 5000}


def test_forbidden_characters_are_named() -> None:
    with pytest.raises(RecipeError, match=r"character number 4 \(U\+0007\)"):
        parse("a: \x07", where="here")


_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=8), _leaves | st.lists(_leaves, max_size=3), max_size=3))
def test_what_is_written_reads_back(value: dict[str, object]) -> None:
    assert parse(write(value), where="here").value == value


@pytest.mark.parametrize(
    "text", ["1e5", "12e4567", ".5e5", "yes", "null", "~", "", "0x1", "1:30", "a\nb\n", " x", "#x", "\x85"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse(write({"a": text}), where="here").value == {"a": text}


# --- sources and their order --------------------------------------------------------------------


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    _file(tmp_path, "name: base\nsft: {epochs: 2, batch_size: 8}\ngrpo: {steps: 10}\n", "base.yaml")
    path = _file(tmp_path, "extends: base.yaml\nname: mine\nsft: {epochs: 4}\n")
    resolved = load_recipe(path, ["grpo.steps=20", "grpo.steps=30"])
    recipe, where = resolved.recipe, resolved.provenance
    assert (recipe.name, recipe.sft.epochs, recipe.sft.batch_size, recipe.grpo.steps) == ("mine", 4.0, 8, 30)
    assert where["sft.epochs"] == path
    assert where["sft.batch_size"] == str(tmp_path / "base.yaml")
    assert where["grpo.steps"] == "command line"
    assert where["grpo.clip_high"] == "default"
    assert list(where) == list(recipe_keys())


def test_a_section_given_in_part_keeps_its_own_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(_file(tmp_path, "grpo:\n  optimizer:\n    lr: 5e-5\n")).recipe
    assert recipe.grpo.optimizer == Recipe().grpo.optimizer.model_copy(update={"lr": 5e-5})
    assert recipe.grpo.optimizer.schedule != Recipe().sft.optimizer.schedule


def test_lists_replace(tmp_path: Path) -> None:
    _file(tmp_path, "sft: {freeze: [vision_tower, merger]}", "base.yaml")
    recipe = load_recipe(_file(tmp_path, "extends: ./base.yaml\nsft: {freeze: [merger]}")).recipe
    assert recipe.sft.freeze == ("merger",)


def test_extends_looks_beside_the_file_and_among_the_shipped(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    _file(tmp_path, "extends: quickstart\nseed: 7", "base.yaml")
    resolved = load_recipe(_file(tmp_path / "deep", "extends: ../base.yaml"))
    assert resolved.recipe.seed == 7
    assert resolved.recipe.name == "quickstart"
    assert resolved.provenance["name"] == "recipes/quickstart.yaml"


def test_circles_are_shown(tmp_path: Path) -> None:
    _file(tmp_path, "extends: b.yaml", "a.yaml")
    _file(tmp_path, "extends: ./a.yaml", "b.yaml")
    said = _refusal(str(tmp_path / "a.yaml"))
    assert "in a circle" in said
    assert said.count("a.yaml ->") == 1
    assert said.count("b.yaml ->") == 1


def test_empty_and_comment_only_files_are_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(_file(tmp_path, "")).recipe == Recipe()
    assert load_recipe(_file(tmp_path, "# nothing yet\n")).recipe == Recipe()


def test_no_such_recipe() -> None:
    assert "did you mean quickstart?" in _refusal("quikstart")
    assert "there is no recipe file nowhere/x.yaml" in _refusal("nowhere/x.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"- a\n", "`key: value` lines"),
        (b"extends: [a]", "extends should be"),
        (b"extends:", "extends should be"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert said in _refusal(str(path))


# --- the command line ---------------------------------------------------------------------------


def test_overrides() -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "grpo.clip_high=0.28",
            "data.rl=my file: a [draft].jsonl",
            "grpo.kl={kind: k3, coefficient: 1e-2}",
            "model.revision=12e4567",
            "prompt.system=null",
            'name="null"',
            "grpo.clip_dual=null",
            "sft.freeze=[vision_tower]",
            "sft.optimizer.lr=1e-5",
        ],
    ).recipe
    assert recipe.grpo.clip_high == 0.28
    assert recipe.data.rl == "my file: a [draft].jsonl"
    assert (recipe.grpo.kl.kind, recipe.grpo.kl.coefficient) == ("k3", 0.01)
    assert recipe.model.revision == "12e4567"
    assert recipe.prompt.system is None
    assert recipe.name == "null"
    assert recipe.grpo.clip_dual is None
    assert recipe.sft.freeze == ("vision_tower",)
    assert recipe.sft.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpo.steps", "is not key=value"),
        ("=3", "is not key=value"),
        ("grpo.steps=", "grpo.steps has no value"),
        ("grpo.kl=k3", "grpo.kl is a section"),
        ("grpo.steps.x=1", "grpo.steps should be a whole number"),
        ("extends=quickstart", "unknown key extends"),
        ("grpo.kl={kind: k3", "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, said: str) -> None:
    message = _refusal("quickstart", override)
    assert message.startswith("command line")
    assert said in message


# --- what is refused, in which words --------------------------------------------------------------


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("grpo.clip_hi", ["grpo.clip_high"]),
        ("gropo", ["grpo"]),
        ("grpo.lr", ["grpo.optimizer.lr"]),
        ("lr", ["sft.optimizer.lr", "grpo.optimizer.lr"]),
        ("clip_hgih", ["grpo.clip_high"]),
        ("sft.kl.kind", ["grpo.kl.kind"]),
        ("grpo.optimiser", ["grpo.optimizer"]),
        ("gpro.optimizer.lr", ["grpo.optimizer.lr"]),
        ("grpo.max_token", ["grpo.max_new_tokens"]),
        ("grpo.kl.coef", ["grpo.kl.coefficient"]),
        ("zzz", []),
    ],
)
def test_nearest_key(unknown: str, meant: list[str]) -> None:
    assert nearest(unknown) == meant


def test_unknown_key_names_file_line_and_the_near_one(tmp_path: Path) -> None:
    path = _file(tmp_path, "# mine\ngrpo:\n  clip_hi: 3\n")
    assert _refusal(path) == f"{path}:3: unknown key grpo.clip_hi\n  -> did you mean grpo.clip_high?"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "grpo: {steps: 2.5}",
            "grpo.steps should be a whole number at least 1 and at most 1,000,000,000 (got 2.5)",
        ),
        (
            "grpo: {steps: true}",
            "grpo.steps should be a whole number at least 1 and at most 1,000,000,000 (got true)",
        ),
        (
            "grpo: {steps: '3'}",
            'grpo.steps should be a whole number at least 1 and at most 1,000,000,000 (got "3")',
        ),
        ("grpo: {entropy: {control: kl_cov}}", "set optimizer_steps=2 or more"),
        ("grpo: {loss: gspo, entropy: {control: clip_cov}}", "one ratio for a whole answer"),
        ("grpo: {entropy: {bounds: [5, 1]}}", "no covariance lies between bounds=[5.0, 1.0]"),
        ("grpo: {loss: ppo}", 'grpo.loss should be one of grpo, gspo, cispo, sapo, dppo (got "ppo")'),
        (
            "grpo: {clip_dual: 0.5}",
            "grpo.clip_dual should be a number above 1 and at most 1,000,000 or null (got 0.5)",
        ),
        ("sft: {freeze: merger}", "each item one of vision_tower, merger, language_model"),
        ("sft: {freeze: [vision]}", 'got ["vision"]'),
        ("grpo: {top_p: 1.5}", "grpo.top_p should be a number at least 1e-06 and at most 1 (got 1.5)"),
        ("sft: {optimizer: {betas: [0.9]}}", "a list of 2, each item a number at least 0 and below 1"),
        ("name: 3", "name should be text (got 3)"),
        ("grpo: {reward: {accuracy: -1}}", "should be a number at least 0 and at most 1,000,000 (got -1)"),
        (
            "grpo: {reward: {functions: a.py:f}}",
            'a number at least -1,000,000 and at most 1,000,000} (got "a.py:f")',
        ),
        (
            "grpo: {reward: {functions: {a.py:f: much}}}",
            "functions should be a mapping {text: a number at least -1,000,000",
        ),
        ("grpo: {reward: {functions: {a.py:f: 1, b.py:f: 2}}}", "two parts are called f"),
        ("grpo: {reward: {functions: {a.py:length: 1}}}", "two parts are called length"),
        ("grpo: {reward: {accuracy: 0}}", "no part that scores single answers has a weight"),
        ("grpo: {reward: {accuracy: 0, length: 1}}", "no part that scores single answers has a weight"),
        ("model: {trust_remote_code: yes}", 'should be true or false (got "yes")'),
        (
            "eval: {temperature: .inf}",
            "eval.temperature should be a number at least 0 and at most 1,000 (got Infinity)",
        ),
        ("sft:", "sft is a section with keys of its own (got null)"),
        ("study: {arms: [base]}", "the arms are base and at least one of sft, grpo, sft_grpo"),
    ],
)
def test_wrong_values_in_plain_words(tmp_path: Path, text: str, said: str) -> None:
    path = _file(tmp_path, f"seed: 1\n{text}")
    message = _refusal(path)
    assert message.startswith(f"{path}:2: ")
    assert said in message
    assert "pydantic" not in message


def test_all_wrong_values_at_once(tmp_path: Path) -> None:
    path = _file(tmp_path, "grpo:\n  steps: none\nsft:\n  epochs: -1\n")
    message = _refusal(path, "eval.top_p=2")
    assert "3 values" in message
    assert f"{path}:2: grpo.steps" in message
    assert f"{path}:4: sft.epochs" in message
    assert "command line: eval.top_p" in message


def test_every_key_says_what_it_allows() -> None:
    assert all(allowed(field) for field in recipe_keys().values())
    assert allowed(recipe_keys()["prompt.system"]) == "text or null"


# --- the whole recipe -------------------------------------------------------------------------------


def test_a_dumped_recipe_loads_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["grpo.optimizer.lr=1e-7", "data.image_root=~", "name=1e5"]).recipe
    path = _file(tmp_path, dump(recipe))
    resolved = load_recipe(path)
    assert resolved.recipe == recipe
    assert set(resolved.provenance.values()) == {path}, "every default is spelled out"


def test_differences() -> None:
    one = load_recipe("quickstart").recipe
    other = load_recipe("quickstart", ["grpo.kl.kind=k3", "seed=5"]).recipe
    assert differences(one, one) == []
    assert differences(one, other) == [("seed", one.seed, 5), ("grpo.kl.kind", one.grpo.kl.kind, "k3")]


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).recipe.name == name


def test_quickstart_needs_nothing_from_outside() -> None:
    recipe = load_recipe("quickstart").recipe
    assert recipe.study.arms == ("base", "sft", "sft_grpo")
    assert recipe.model.name == "builtin"
    assert all(
        source.startswith("builtin:") for source in (recipe.data.cold_start, recipe.data.rl, recipe.data.test)
    )


def _row(label: str, *overrides: str) -> str:
    return dict(summary_rows(load_recipe("quickstart", overrides).recipe))[label]


SHOWN = {
    "RL clip": {
        "grpo.clip_high=0.28": "high 0.28",
        "grpo.clip_low=0.11": "low 0.11",
        "grpo.clip_dual=null": "dual off",
        "grpo={loss: sapo, sapo_temperatures: [1, 2]}": "temperature 1 for good answers, 2 for others",
        "grpo={loss: dppo, clip_low: 0.1, clip_high: 0.15}": "up by 0.15 at most, down by 0.1",
    },
    "RL entropy": {
        "grpo.entropy={control: clip_cov, bounds: [0.5, 3]}": "0.0002 of the tokens, where the covariance of "
        "logprob and advantage is 0.5 to 3",
        "grpo={optimizer_steps: 2, entropy: {control: kl_cov, coefficient: 2}}": "2 x |log ratio| for 0.002",
        "grpo.entropy={control: bonus, target: 0.3, bonus_max: 0.1}": "up to 0.3 nats a token; its weight "
        "moves by 0.005 a step, up to 0.1",
    },
    "RL mismatch mask": {
        "grpo.mismatch_mask=0.02": "more than 0.02 nats",
    },
    "RL KL": {
        "grpo.kl={kind: k3, coefficient: 0.01}": "0.01 x k3",
        "grpo.kl={kind: k3, coefficient: 0}": "none",
    },
    "RL advantage": {
        "grpo.advantage=rloo": "mean of the others",
        "grpo={advantage: pass_k, pass_k: 2}": "each set of 2 answers",
    },
    "RL loss averaging": {
        "grpo.loss_average=micro_batch": "each pack",
    },
    "SFT loss": {
        "sft.loss_average=example": "each response's",
    },
    "RL old logprobs": {
        "grpo.optimizer_steps=4": "the sampler's",
    },
    "SFT frozen": {
        "sft.freeze=[vision_tower, merger]": "vision tower, merger",
    },
    "RL frozen": {
        "grpo.freeze=[language_model]": "language model",
    },
    "image size": {
        "images.max_pixels=784000": "784,000 pixels (4 to 1,000 tokens",
    },
    "system prompt": {
        "prompt.system=Think.": '"Think."',
        "prompt.system=null": "template's own",
    },
    "system prompt in RL": {
        "prompt.rl_system=Look.": '"Look."',
    },
    "RL sampling": {
        "grpo.temperature=0.7": "temperature 0.7",
    },
    "test sampling": {
        "eval.blind=other": "again with another problem's image",
        "eval.blind=removed": "again without the image",
        "eval.temperature=0": "greedy",
    },
    "RL optimiser": {
        "grpo.optimizer.lr=1e-6": "lr 1e-06",
    },
    "SFT optimiser": {
        "sft.optimizer.warmup_steps=1": "1 step of warm-up",
    },
    "SFT": {
        "sft.batch_size=17": "17 demonstrations",
    },
    "RL": {
        "grpo={prompts_per_step: 5, group_size: 4}": "5 prompts x 4 = 20 rollouts",
    },
    "RL answers at the limit": {
        "grpo.overlong={buffer: 20, penalty: 0.5}": "0.5 off over the last 20 tokens",
    },
    "RL groups all alike": {
        "grpo.dynamic_sampling=1": "1 more round",
    },
    "reward": {
        "grpo.reward.allow_fallbacks=true": "a lone letter",
        "grpo.reward={accuracy: 0.9, format: 0.1}": "0.9 x accuracy + 0.1 x format; correct: by accuracy",
        "grpo.reward={accuracy: 0, functions: {a/b.py:f: -2}}": "-2 x f; correct: by f",
    },
    "reward: accuracy": {
        "grpo.reward={format: 0.1, allow_fallbacks: true}": "a lone letter",
    },
    "reward: f": {
        "grpo.reward.functions={a/b.py:f: 1}": "returned by b.py:f",
    },
    "cold-start teacher": {
        "teacher.keep=all": "wrong ones kept too",
        "teacher={model: m, base_url: 'http://x/v1', max_samples: 4}": "m at http://x/v1",
        "teacher={max_samples: 4, enough_kept: 2}": "4 samples until 2 to keep",
    },
    "chain of thought": {
        "teacher={chain: self_critic, format: think}": "self critic, think",
        "teacher={pick: diverse, max_kept: 3, enough_kept: 3}": "diverse, at most 3",
    },
    "RL data": {
        "data.rl_pass_rate=[0.01, 0.99]": "pass rate from 0.01 to 0.99",
        "data.rl_blind=drop": "without those that the base answers blind",
    },
    "RL reward for sight": {
        "grpo.sight.coefficient=0.02": "with 60% of each image black (PAPO), less 0.03 x both entropies",
        "grpo.sight={coefficient: 0.02, gradient: both}": "gradient through both",
    },
    "RL losses, Mixed": {
        "study.arms=[base, mixed]": "reward 1, sft 1 to 0; 32 demonstrations",
    },
    "RL losses, Cold start + RL": {
        "grpo.also={sft: 0.1, arms: [sft_grpo]}": "reward 1, sft 0.1; 32",
    },
    "test set": {
        "data.test=mine.jsonl": "mine.jsonl",
    },
}
"""What a row of the table says after an override."""


@pytest.mark.parametrize(
    ("label", "override", "text"),
    [(label, override, text) for label, rows in SHOWN.items() for override, text in rows.items()],
)
def test_the_table_shows_every_choice(label: str, override: str, text: str) -> None:
    assert text in _row(label, override)


def test_recipes_load_without_heavy_libraries() -> None:
    program = (
        "import sys\nfrom rlcs.recipe import loading, table\n"
        "table.summary_rows(loading.load_recipe('quickstart').recipe)\n"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


SERVERS = ["rollout.engine=vllm_server"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grpo.overlap=on_policy"], "set rollout.engine=vllm_server"),
        (["grpo.overlap=on_policy", "rollout.engine=vllm_colocated"], "now vllm_colocated"),
        ([*SERVERS, "grpo.overlap=on_policy", "grpo.loss_average=micro_batch"], "depends on what lies in a"),
        (
            [*SERVERS, "grpo.overlap=one_step_off", "rollout.importance_cap=null"],
            "corrected by importance weights",
        ),
        ([*SERVERS, "grpo.overlap=one_step_off", "grpo.optimizer_steps=4"], "grpo.old_logprobs=policy"),
    ],
)
def test_an_overlap_that_is_not_possible_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", words)


def test_what_overlaps_unless_the_recipe_says_so() -> None:
    def overlap(*words: str) -> str:
        return load_recipe("quickstart", list(words)).recipe.overlap

    assert overlap() == overlap("grpo.overlap=none") == overlap("rollout.engine=vllm_colocated") == "none"
    assert overlap(*SERVERS) == "on_policy"
    assert overlap(*SERVERS, "grpo.loss_average=micro_batch") == overlap(*SERVERS, "grpo.overlap=none")
    assert overlap(*SERVERS, "grpo.overlap=one_step_off", "grpo.optimizer_steps=1") == "one_step_off"


@pytest.mark.fault(
    "limits", "a recipe whose name leads out of runs/", "a sentence before anything is written"
)
@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/b", "a\\b", "..", ".", "", " ", "x" * 101, "a\nb", "a\0b"]
)
def test_a_name_is_that_of_a_folder(name, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"name: {json.dumps(name)}\n")
    with pytest.raises(RecipeError, match=r"name should be a name of at most 100 characters without /"):
        load_recipe(str(path))


@pytest.mark.fault("limits", "a recipe of 200,000 keys", "a sentence at once")
def test_a_recipe_that_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("".join(f"key{n}: 1\n" for n in range(200_000)))
    with pytest.raises(RecipeError, match=r"at most 262,144 bytes(?s:.*)data\.problems"):
        load_recipe(str(path))
