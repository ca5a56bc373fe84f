"""From a run to a folder that strangers load, an honest card, and the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from conftest import SMALL_STUDY, rlcs
from hub_server import HubServer
from rlcs.data import puzzles
from rlcs.engines.local import LocalEngine
from rlcs.errors import UserError
from rlcs.model import loading
from rlcs.model.chat import default_system
from rlcs.model.chat_format import CHATML
from rlcs.publish import quantise
from rlcs.publish.export import Export, export
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Model
from rlcs.storage import read_json, write_json

SMALL = [
    *SMALL_STUDY,
    "grpo.steps=1",
    "grpo.max_new_tokens=24",
    "eval.max_new_tokens=24",
    "study.arms=[base, sft_grpo]",
]

# Nothing of rlcs can be imported here.
STOCK = "import sys\nsys.modules['rlcs'] = None\n"


def python(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK + program],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def apart(*words, **environment):
    """A command in a process of its own: the hub's client reads its variables when it is imported."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "rlcs", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = rlcs("run", "quickstart", *SMALL, "--quiet", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "puzzler"
    done = rlcs("export", run, "--out", folder)
    assert done.returncode == 0 and "README.md" in done.stdout, done.stderr
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "who may read one may read the other"
    return folder


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def snippet(folder: Path, word: str) -> str:
    return next(code for code in re.findall(r"```python\n(.*?)```", card(folder), re.S) if word in code)


def problems(folder: Path, count: int):
    drawn = puzzles.load("puzzles", split="test", count=count, seed=7)
    for number, problem in enumerate(drawn):
        (folder / f"{number}.png").write_bytes(problem.images[0].data)
    write_json(folder / "questions.json", [problem.question for problem in drawn])
    return drawn


ANSWER_ALL = """
import json
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1] if sys.argv[1:] else NAME, dtype="auto")
processor = AutoProcessor.from_pretrained(NAME)
found = []
for number, question in enumerate(json.load(open("questions.json"))):
    content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs)
    found.append(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(found))
"""


def test_stock_transformers_gives_the_same_greedy_answers(run, exported, tmp_path):
    asked = problems(tmp_path, 12)
    theirs = json.loads(python(f"NAME = {str(exported)!r}\n" + ANSWER_ALL, tmp_path))
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    vlm = loading.load(Model(name=str(run / "sft_grpo" / "final")), device=torch.device("cpu"))
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    sampling = chat.sampling(temperature=0, max_new_tokens=recipe.eval.max_new_tokens)
    groups = LocalEngine(vlm, chat, max_rows=12).sample([chat.prompt(p) for p in asked], sampling)
    assert [group[0].text for group in groups] == theirs
    assert len(set(theirs)) > 3


def test_the_card_s_own_snippets_run(exported, tmp_path, monkeypatch, capsys):
    shutil.copytree(exported, tmp_path / "puzzler")
    (drawn,) = problems(tmp_path, 1)
    shutil.copy(tmp_path / "0.png", tmp_path / "image.png")
    program = snippet(exported, "AutoProcessor").replace("What is the answer?", drawn.question)
    assert python(program, tmp_path).strip()
    compile(snippet(exported, "OpenAI"), "card", "exec")
    monkeypatch.chdir(tmp_path)
    exec(snippet(exported, "import rlcs"), {})  # noqa: S102
    assert capsys.readouterr().out.strip()


def test_the_card_tells_the_run(run, exported):
    text, summary = card(exported), read_json(run / "summary.json")
    data = ModelCard.load(exported / "README.md").data
    assert (
        data.license == "apache-2.0" and data.base_model is None and data.pipeline_tag == "image-text-to-text"
    )
    (result,) = data.eval_results
    own = summary["arms"]["sft_grpo"]
    assert result.metric_value == round(own["accuracy"], 4) and result.dataset_args["problems"] == 20
    assert f"[{own['low']:.3f}, {own['high']:.3f}]" in result.metric_name
    base = summary["arms"]["base"]
    assert f"| Base | {base['accuracy']:.1%} | {base['low']:.1%} to {base['high']:.1%} | 20 |" in text
    kept = read_json(run / "cold_start" / "stats.json")["kept"]
    assert f"12 answered by `builtin` | {kept} kept of 12 asked |" in text
    assert f"written by {metadata.version('transformers')}" in text and '"transformers>=5"' in text
    assert "| reinforcement learning | `builtin:puzzles?count=12&seed=2` | 12 |" in text
    assert "| RL clip | low 0.2, high 0.3, dual 3 |" in text and "seed 0" in text and "A toy model." in text
    assert "2505.22334" in text and "@software{rlcs" in text
    gained = re.search(r"95% interval ([+-][\d.]+) to", text)
    assert ("does not show that training helped" in text) == (float(gained[1]) <= 0)


@pytest.mark.parametrize(
    ("stats", "authors"),
    [
        ({"given": 1500, "asked": 0}, "1,500 with the demonstrations of that data |"),
        ({"given": 2, "asked": 10}, "2 with the demonstrations of that data and 10 answered by `builtin` |"),
        ({}, "by an author who is not recorded |"),
    ],
)
def test_the_card_says_who_made_the_demonstrations(run, tmp_path, stats, authors):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    write_json(tmp_path / "run" / "cold_start" / "stats.json", stats)
    export(Export(model=str(tmp_path / "run"), out=tmp_path / "out"))
    assert authors in card(tmp_path / "out")


def test_other_arms_precisions_and_plain_models(run, tmp_path):
    base, final, plain = tmp_path / "base", tmp_path / "sft", tmp_path / "plain"
    export(Export(model=str(run), arm="base", dtype="bf16", out=base))
    assert read_json(base / "config.json")["dtype"] == "bfloat16"
    assert "converted to bfloat16" in card(base) and "| RL clip" not in card(base)
    assert "**Base (this model)**" in card(base)
    export(Export(model=str(run / "sft" / "final"), out=final, name="me/mine"))
    assert "Cold start only" in card(final) and 'name = "me/mine"' in card(final)
    assert "| RL clip" not in card(final) and "| SFT loss" in card(final)
    export(Export(model="builtin", out=plain))
    assert "No measurement came with this export" in card(plain) and "## Training" not in card(plain)


def test_what_cannot_be_exported_says_why(run, tmp_path):
    out = tmp_path / "a"

    def refused(model, *, out=out, arm=None):
        with pytest.raises(UserError) as caught:
            export(Export(model=str(model), out=out, arm=arm))
        return str(caught.value)

    assert f"name one of: {run}/sft, {run}/sft_grpo" in refused(run, arm="grpo")
    assert "did you mean sft_grpo" in refused(run, arm="sft_grp")
    assert "not empty" in refused(run, out=run)
    assert "neither a run nor a model" in refused(tmp_path)
    assert "only a run has arms" in refused("builtin", arm="grpo")
    seeds = tmp_path / "seeds"
    shutil.copytree(run, seeds / "seed-0")
    shutil.copy(run / "recipe.yaml", seeds)
    assert "seed-0" in refused(seeds)
    done = rlcs("export", "builtin", "--dtype", "int3", "--out", out)
    assert done.returncode == 2 and "use bf16, fp16, fp32" in done.stderr and not out.exists()


def test_what_was_decided_travels_with_the_model(run, exported, tmp_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(exported)
    system = load_recipe(str(run / "recipe.yaml")).recipe.prompt.system
    assert default_system(processor, CHATML) == system and system in card(exported)
    assert processor.image_processor.size["longest_edge"] == 1_204_224
    config = read_json(exported / "generation_config.json")
    assert (
        config["do_sample"] is False
        and config["max_new_tokens"] == 24
        and len(config["suppress_tokens"]) == 6
    )
    sampled = tmp_path / "sampled"
    shutil.copytree(run, sampled, ignore=shutil.ignore_patterns("checkpoints"))
    text = (sampled / "recipe.yaml").read_text()
    (sampled / "recipe.yaml").write_text(re.sub(r"(\neval:\n  temperature:) 0\S*", r"\1 0.6", text))
    export(Export(model=str(sampled), out=tmp_path / "out"))
    config = read_json(tmp_path / "out" / "generation_config.json")
    assert config["do_sample"] is True and config["temperature"] == 0.6 and config["top_k"] == 0


@pytest.mark.parametrize(("form", "share", "alike"), [("int8", 0.65, 11), ("int4", 0.56, 6)])
def test_a_quantised_folder_is_smaller_and_says_so_and_answers(run, exported, tmp_path, form, share, alike):
    folder = tmp_path / form
    done = rlcs("export", run, "--quantise", form, "--out", folder)
    assert done.returncode == 0, done.stderr
    sizes = [(each / "model.safetensors").stat().st_size for each in (folder, exported)]
    assert sizes[0] < share * sizes[1]
    problems(tmp_path, 12)
    stock, whole = (
        json.loads(python(f"NAME = {str(name)!r}\n" + ANSWER_ALL, tmp_path)) for name in (folder, exported)
    )
    assert sum(a == b for a, b in zip(stock, whole, strict=True)) >= alike
    assert f"layers are {form}," in card(folder) and "Measured before the weights were quantised" in card(
        folder
    )
    parameters = re.compile(r"of [\d,]+ parameters")
    assert parameters.findall(card(folder)) == parameters.findall(card(exported))
    ours = loading.load(Model(name=str(folder)), device=torch.device("cpu"))
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    chat = loading.make_chat(ours, recipe.prompt, recipe.images)
    prompts = [chat.prompt(p) for p in puzzles.load("puzzles", split="test", count=12, seed=7)]
    groups = LocalEngine(ours, chat, max_rows=12).sample(
        prompts, chat.sampling(temperature=0, max_new_tokens=24)
    )
    assert [group[0].text for group in groups] == stock
    plain = loading.load(Model(name=str(exported)), device=torch.device("cpu")).model.state_dict()
    changed = {name for name, weight in ours.model.state_dict().items() if not weight.equal(plain[name])}
    assert changed == {name for name in plain if re.search(r"language_model.*_proj\.weight", name)}
    with pytest.raises(UserError, match="quantised already"):
        export(Export(model=str(folder), out=tmp_path / "twice", quantise=form))


def test_what_cannot_be_quantised_says_why(exported, tmp_path, monkeypatch):
    done = rlcs("export", exported, "--quantise", "int3", "--out", tmp_path / "a")
    assert done.returncode == 2 and "use int8, int4" in done.stderr
    export(Export(model=str(exported), out=tmp_path / "b", quantise="int4"))
    for room in (quantise, loading):
        monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlcs\[quantise\]'"):
        export(Export(model=str(exported), out=tmp_path / "a", quantise="int4"))
    with pytest.raises(UserError, match=r"pip install 'rlcs\[quantise\]'"):
        loading.load(Model(name=str(tmp_path / "b")))
    assert not (tmp_path / "a").exists()


# --- the hub --------------------------------------------------------------------------------------


def test_the_dry_run_lists_every_file_and_sends_nothing(exported):
    with HubServer() as hub:
        done = apart("publish", exported, "me/mine", "--dry-run", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        assert done.returncode == 0 and not hub.seen, done.stderr
    files = list(exported.iterdir())
    assert f"in {len(files)} files would go to me/mine" in done.stdout
    listed = json.loads(apart("publish", exported, "me/mine", "--dry-run", "--json").stdout)
    assert apart("publish", exported, "me/mine", "--json").returncode == 2, (
        "there is no list without --dry-run"
    )
    assert {each["path"]: each["size"] for each in listed["files"]} == {
        path.name: path.stat().st_size for path in files
    }
    assert "do not name me/mine" in done.stderr


def test_a_model_goes_to_the_hub_byte_by_byte(exported):
    with HubServer() as hub:
        options = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        done = apart("publish", exported, "me/mine", **options)
        assert done.returncode == 0 and "me/mine" in done.stdout, done.stderr
        assert hub.repos == {"me/mine": {"private": True, "type": "model"}}
        assert hub.files == {path.name: path.read_bytes() for path in exported.iterdir()}
        hub.refuse = 403
        refused = apart("publish", exported, "me/mine", "--public", **options)
    assert (
        refused.returncode == 2
        and "the hub refuses it" in refused.stderr
        and "hf auth login" in refused.stderr
    )


def test_a_hub_that_cannot_be_reached_gets_a_sentence(exported):
    done = apart("publish", exported, "me/mine", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "me/mine: the hub cannot be used: " in done.stderr and "check the connection" in done.stderr


def test_surprising_files_are_refused(exported, tmp_path):
    folder = tmp_path / "puzzler"
    shutil.copytree(exported, folder)
    surprises = {
        "optimizer.safetensors": "optimiser state",
        "checkpoints/step-1/model.safetensors": "a training checkpoint",
        "image.png": "perhaps of the training data",
        "pytorch_model.bin": "a pickle, which runs code",
        "kept.jsonl": "training or evaluation data",
        ".env": "perhaps a key",
        "notes.txt": "not a file of a model folder",
        "extra_config.json": "it holds what looks like a key",
    }
    for name in surprises:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hf_" + "a" * 34 if name == "extra_config.json" else "x")
    (folder / "LICENSE").symlink_to("/etc/hostname")
    done = apart("publish", folder, "me/mine", "--dry-run")
    assert done.returncode == 2
    for name, why in {**surprises, "LICENSE": "a link to a file outside"}.items():
        assert re.search(rf"{re.escape(name)}: [^;]*{why}", done.stderr), (name, done.stderr)
    for name in ("optimizer.safetensors", ".env", "notes.txt", "pytorch_model.bin", "kept.jsonl", "LICENSE"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    only_secret = apart("publish", folder, "me/mine", "--dry-run", "--allow", "*")
    assert only_secret.returncode == 2 and "1 files" in only_secret.stderr
    (folder / "extra_config.json").unlink()
    assert apart("publish", folder, "me/mine", "--dry-run", "--allow", "*.png").returncode == 0
    assert apart("publish", tmp_path, "me/mine", "--dry-run").returncode == 2
