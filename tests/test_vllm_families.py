"""Families of models with a real vLLM on the CPU: rollouts, new weights, exports, chat templates.

Run by `make vllm-test` with `test_vllm.py`, which says what they need. `plain_vllm.py` says what the vLLM
of these tests has beside its own kernels for CPUs; gated delta nets are tried with those kernels too.
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

import family_models
from conftest import make_problem, tree_of
from rlcs.data.images import data_uri, encoded_image
from rlcs.engines import factory
from rlcs.engines.factory import open_engines
from rlcs.engines.local import LocalEngine
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.chat_format import ChatFormat
from rlcs.model.vlm import Vlm
from rlcs.pipeline.study import engine_needs
from rlcs.publish.export import Export, export
from rlcs.records import IMAGE_SLOT, Problem, Prompt, Rollout
from rlcs.train.engine_faults import Scorer
from test_vllm import CPU, perturb, program, recipe_of

pytestmark = pytest.mark.skipif(program() is None, reason="no vLLM: `make vllm-test`")

INTERLEAVED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
QWEN_3 = {"head_dim": 64, "rope_parameters": INTERLEAVED | {"mrope_section": [12, 10, 10]}}
EXPERTS = {"moe_intermediate_size": 64, "norm_topk_prob": True}
DELTA_NETS = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_5": DELTA_NETS,
    "qwen3_5_moe": DELTA_NETS | EXPERTS,
    "qwen3_vl_moe": QWEN_3 | EXPERTS,
    "internvl": {"head_dim": 64},
    "gemma4": {"global_head_dim": 64},
    # Its attention for CPUs is causal, whatever a model says about images.
    "gemma4_moe": {"global_head_dim": 64, "use_bidirectional_attention": None},
}
"""Sizes that vLLM's kernels for CPUs take: multiples of 32, and 64 or 128 for both of a gated delta net."""
FAMILIES = sorted(family_models.BUILDERS.keys() - {"qwen2_vl", "qwen3_vl"})
"""All but those of which another has every part, to keep `make vllm-test` short."""


def problems_of(chat: ChatFormat) -> list[Problem]:
    """With one image, with two, with none, and with what looks like a placeholder."""
    two = make_problem("two", f"And {IMAGE_SLOT} or {IMAGE_SLOT}?", sizes=((120, 70), (64, 200)))
    typed = make_problem("typed", f"What is {chat.image}{chat.image_end} in this {IMAGE_SLOT}?")
    return [make_problem("one"), two, make_problem("none", sizes=()), typed]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)


def plain_vllm(folder: Path) -> Path:
    """The `vllm` program that can on a CPU what vLLM can on a GPU."""
    path = folder / "vllm"
    python, script = Path(str(program())).parent / "python", Path(__file__).parent / "plain_vllm.py"
    path.write_text(f'#!/bin/sh\nexec "{python}" "{script}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("family", "dtype", "limit"),
    [(family, "float32", 1e-3) for family in FAMILIES] + [("qwen3_5", "bfloat16", 0.03)],
)
def test_a_family_is_sampled_served_and_updated(
    family: str, dtype: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`limit`: between logprobs of vLLM and of the trainer's pass."""
    folder = family_models.build(family, tmp_path / "random", text=SIZES[family])
    words = [f"model.name={folder}", f"model.dtype={dtype}", "prompt.max_tokens=2048"]
    if dtype == "float32":
        words.append(f"rollout.executable={plain_vllm(tmp_path)}")
        monkeypatch.setattr(factory, "RECURRENT_DTYPES", ("float32",))
        monkeypatch.setattr(factory, "EXPERTS_STALE_ON_CPU", False)
    recipe = recipe_of(*words)
    vlm = loading.load(recipe.model)
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    problems = problems_of(vlm.family.chat_format)
    prompts = [chat.prompt(problem) for problem in problems]
    warm = chat.sampling(max_new_tokens=24, n=3, seed=1)
    with open_engines(engine_needs(recipe), tmp_path) as make:
        engine = make(vlm, chat, 64)
        before = engine.sample(prompts, warm)
        assert largest_gap(vlm, chat, prompts, before) < limit
        again = engine.sample(prompts[::-1], warm)  # on caches and states of the first time
        assert largest_gap(vlm, chat, prompts[::-1], again) < limit
        (served,) = (path for path in (tmp_path / "weights").iterdir() if path.is_dir())
        if dtype == "float32":
            require_same_answer(vlm, chat, engine._backend._servers[0]._url, problems[0])
            require_same_folder(served, exported(folder, tmp_path / "exported"))
        perturb(vlm, 0.03)
        assert largest_gap(vlm, chat, prompts, engine.sample(prompts, warm)) > 2 * limit, "not published"
        engine.sync()
        after = engine.sample(prompts, warm)
        assert largest_gap(vlm, chat, prompts, after) < limit and after != before


def largest_gap(vlm: Vlm, chat: Chat, prompts: list[Prompt], groups: list[tuple[Rollout, ...]]) -> float:
    """Between vLLM's logprobs and the trainer's without the banned ids; in bfloat16 the mean gap."""
    banned = chat.sampling(max_new_tokens=1).banned_ids
    scorer = Scorer(vlm=vlm, chat=chat, budget=10**6, temperature=1.0, banned_ids=banned)
    rollouts = [rollout for group in groups for rollout in group]
    chosen = torch.tensor([[index] for rollout in rollouts for index in rollout.ids])
    trees = [tree_of(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    ours = scorer(trees, chosen)
    theirs = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])
    gaps = (ours.logprobs[:, 0] + ours.banned - theirs).abs()
    return float(gaps.max() if vlm.model.dtype == torch.float32 else gaps.mean())


def exported(model: Path, out: Path) -> Path:
    export(Export(model=str(model), out=out))
    return out


def require_same_folder(served: Path, exported: Path) -> None:
    """What vLLM reads of the two is the same, but for the head, which on a CPU is served apart."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (served, exported))
    assert set(theirs) <= set(ours) and {
        name.rpartition("lm_head")[1] for name in set(ours) - set(theirs)
    } <= {"lm_head"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (served, exported)]
    assert configs[0]["architectures"] == configs[1]["architectures"]


def require_same_answer(vlm: Vlm, chat: Chat, url: str, problem: Problem) -> None:
    """The server's chat template words the prompt as we do, and its greedy answer is ours."""
    image = {"type": "image_url", "image_url": {"url": data_uri(encoded_image(problem.images[0]))}}
    turn = {"role": "user", "content": [image, {"type": "text", "text": problem.question}]}
    prompt, greedy = chat.prompt(problem), chat.sampling(max_new_tokens=16, temperature=0.0)
    [[answer]] = LocalEngine(vlm, chat, max_rows=8).sample([prompt], greedy)
    asked = {
        "messages": [turn],
        "temperature": 0,
        "max_tokens": 16,
        "logit_bias": dict.fromkeys(greedy.banned_ids, -100),
        "ignore_eos": True,
        "stop_token_ids": list(greedy.stop_ids),
        "return_token_ids": True,
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=600)
    assert reply.status_code == 200, reply.text
    assert tuple(reply.json()["prompt_token_ids"]) == prompt.ids
    assert tuple(reply.json()["choices"][0]["token_ids"]) == answer.ids
