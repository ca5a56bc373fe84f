"""Checks vLLM: it starts, sees images, agrees on logprobs, takes new weights, sleeps and wakes up.

The model is random, with real layers, as deep as memory allows. vLLM's logprobs may differ from ours by three
times what our own do between the number format and float32.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import free_bytes, synchronize
from rlcs.doctor.gpu.models import Shape, configuration, make_chat, random_tree, random_vlm, shapes
from rlcs.engines.base import Engine
from rlcs.engines.cache import token_bytes
from rlcs.engines.factory import EngineNeeds, open_engines
from rlcs.engines.vllm.protocol import BAN
from rlcs.model import attention
from rlcs.model.chat import Chat
from rlcs.model.loading import default_device
from rlcs.model.packing import pack
from rlcs.model.policy import hidden_states, image_inputs
from rlcs.model.vlm import Vlm
from rlcs.plan.shapes import measure
from rlcs.recipe.sampling import Rollouts
from rlcs.records import Branch, Prompt, Rollout, Tree

FACTOR = 3.0
_LEAST = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Mean differences of logprobs (nats) that are rounding in any case."""
_NOISE = 0.3
"""New weights are the old ones with so much noise, relative to their size."""
_MEMORY_SHARE, _CPU_SHARE = 0.5, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answers:
    """Answers of vLLM to two prompts that differ in their images alone, and the seconds for them."""

    prompts: Sequence[Prompt]
    groups: Sequence[tuple[Rollout, ...]]
    seconds: float


def rollouts(setting: Setting, *, ranks: int = 1) -> Rollouts | None:
    """How vLLM is started here: beside the trainer in its process, or by its program; None: not at all."""
    share = _CPU_SHARE if setting.cpu else _MEMORY_SHARE
    options: dict[str, Any] = {
        "start_limit_s": 600.0,
        "dead_limit_s": 60.0,
        "max_tries": 2,
        "memory_share": share,
    }
    if find_spec("vllm") is not None and not setting.cpu and ranks == 1:
        return Rollouts(engine="vllm_colocated", **options)
    if setting.executable:
        return Rollouts(engine="vllm_server", executable=setting.executable, **options)
    return None


def check(setting: Setting) -> Check:
    """Start vLLM, then one question after the other."""
    settings = rollouts(setting)
    if settings is None:
        return Check(
            ok=None, message="vLLM is not here", fix="pip install 'vllm>=0.32', or --executable BIN/vllm"
        )
    device = torch.device("cpu") if setting.cpu else default_device()
    dtype = torch.float32 if setting.cpu else torch.bfloat16
    shape = _shape(setting, free_bytes(device))
    vlm = random_vlm(shape, device, dtype)
    chat = make_chat(vlm)
    needs = EngineNeeds(settings=settings, max_tokens=2048, max_rows=64, decode_limit=1 << 24)
    values: dict[str, Any] = {"engine": settings.engine, "model": shape.label, "layers": shape.layers}
    with open_engines(needs, Path(setting.folder) / "vllm") as make:
        found = _ask(make(vlm, chat, 64), vlm, chat, device, values)
    weights = sum(parameter.nbytes for parameter in vlm.model.parameters())
    rates = {"start_s": values["start_s"], "weights_to_vllm": weights / values["new_weights_s"]}
    rates |= {name: values[name] for name in ("prefill_tokens", "decode_step_s", "decode_read")}
    if found:
        fix = (
            "use vLLM 0.32 or newer with the versions of docs/reference/versions.md, or rollout.engine=local"
        )
        return Check(ok=False, message="; ".join(found), fix=fix, values=values)
    message = (
        f"{settings.engine} starts in {values['start_s']:.0f} s, logprobs within {values['gap']:.1e} nats "
        f"of ours (limit {values['limit']:.1e}; with the other image {values['other_image_gap']:.1e}), "
        f"new weights in {values['new_weights_s']:.1f} s (within {values['new_gap']:.1e} nats)"
    )
    return Check(ok=True, message=message, values=values, rates=rates)


def _shape(setting: Setting, free: int) -> Shape:
    """3B, whole where a third of free memory holds it, for real seconds a token; else few layers."""
    shape = shapes(setting)[0]
    if setting.cpu:
        return shape
    whole = replace(shape, layers=36, blocks=32, vocabulary=151936)
    fits = 2 * measure(whole.name, configuration(whole)).total < free / 3
    return whole if fits else replace(shape, layers=4)


def _ask(engine: Engine, vlm: Vlm, chat: Chat, device: torch.device, values: dict[str, Any]) -> list[str]:
    """What is wrong; fills in the values."""
    problems = []
    started = time.perf_counter()
    engine.sync()
    engine.sample([_prompts(chat)[0]], chat.sampling(max_new_tokens=1))
    values["start_s"] = time.perf_counter() - started
    values["free_asleep_gb"] = round(free_bytes(device) / 2**30, 2)
    answers = _sample(engine, chat)
    values["answers_s"] = answers.seconds
    values["gap"] = _gap(vlm, chat, answers.prompts, answers.groups)
    values["limit"] = limit = _limit(vlm, chat, answers)
    if not values["gap"] <= limit:
        problems.append(f"vLLM's logprobs are {values['gap']:.2g} nats from ours (limit {limit:.2g})")
    values["other_image_gap"] = _gap(vlm, chat, answers.prompts[::-1], answers.groups)
    if not values["other_image_gap"] > limit:
        problems.append("another image changes no logprobs: vLLM or the model does not see it")
    values |= _speeds(engine, vlm, chat, small=device.type == "cpu")
    old = _gap_of_new_weights(engine, vlm, chat, values)
    if not values["new_gap"] <= limit * 2:
        problems.append(
            f"after new weights vLLM is {values['new_gap']:.2g} nats from ours (limit {2 * limit:.2g})"
        )
    if not old > limit:
        problems.append("the answers do not follow new weights")
    return problems


def _prompts(chat: Chat) -> list[Prompt]:
    """Two prompts of the same question about two images of one size."""
    first, second = (random_tree(chat, [(336, 336)], [1], seed=seed).prompt for seed in (11, 12))
    return [first, replace(second, problem_id=first.problem_id, ids=first.ids)]


def _sample(engine: Engine, chat: Chat) -> _Answers:
    prompts = _prompts(chat)
    started = time.perf_counter()
    groups = engine.sample(prompts, chat.sampling(max_new_tokens=24, n=4))
    return _Answers(prompts=prompts, groups=groups, seconds=time.perf_counter() - started)


def _scored(vlm: Vlm, chat: Chat, prompts: Sequence[Prompt], groups: Sequence[tuple[Rollout, ...]]) -> Tensor:
    """Our logprobs of the answers, as if they were answers to these prompts.

    Without the ids that are never drawn, as in vLLM: a random model would give them a share of one percent.
    """
    trees = []
    for prompt, group in zip(prompts, groups, strict=True):
        branches = tuple(Branch(ids=r.ids, weights=(1.0,) * len(r.ids), logprobs=r.logprobs) for r in group)
        trees.append(Tree(prompt=prompt, branches=branches))
    packed = pack(trees, chat.patches).to(vlm.device)
    plan = attention.make_plan(vlm.attention, packed.layout, vlm.device)
    with torch.no_grad():
        states = hidden_states(vlm, packed.ids, packed.positions, plan=plan, **image_inputs(vlm, packed))
        logits = vlm.model.get_output_embeddings()(states[packed.predictors]).float()
    logits[:, list(chat.sampling(max_new_tokens=1).banned_ids)] += BAN
    return torch.log_softmax(logits, -1).gather(1, packed.targets[:, None])[:, 0].cpu()


def _gap(vlm: Vlm, chat: Chat, prompts: Sequence[Prompt], groups: Sequence[tuple[Rollout, ...]]) -> float:
    """Mean difference of vLLM's logprobs and ours, in nats."""
    theirs = torch.tensor([x for group in groups for rollout in group for x in rollout.logprobs or ()])
    gap = float((_scored(vlm, chat, prompts, groups) - theirs).abs().mean())
    return gap if gap == gap else float("inf")


def _limit(vlm: Vlm, chat: Chat, answers: _Answers) -> float:
    """Three times what our logprobs differ by between the model's format and float32."""
    dtype = vlm.model.dtype
    if dtype == torch.float32:
        return _LEAST[dtype]
    rough = _scored(vlm, chat, answers.prompts, answers.groups)
    vlm.model.float()  # exact for weights in bfloat16, also on the way back
    exact = _scored(vlm, chat, answers.prompts, answers.groups)
    vlm.model.to(dtype)
    return max(FACTOR * float((rough - exact).abs().mean()), _LEAST[dtype])


def _gap_of_new_weights(engine: Engine, vlm: Vlm, chat: Chat, values: dict[str, Any]) -> float:
    """Change the weights, send them, ask again; how far the answers are from the old weights."""
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    generator = torch.Generator(device=vlm.device).manual_seed(5)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.dim() >= 2:
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(noise * parameter.float().std().to(parameter.dtype), alpha=_NOISE)
    synchronize(vlm.device)
    started = time.perf_counter()
    engine.sync()
    engine.sample([_prompts(chat)[0]], chat.sampling(max_new_tokens=1))
    values["new_weights_s"] = time.perf_counter() - started
    answers = _sample(engine, chat)
    values["new_gap"] = _gap(vlm, chat, answers.prompts, answers.groups)
    vlm.model.load_state_dict(before)
    return _gap(vlm, chat, answers.prompts, answers.groups)


def _speeds(engine: Engine, vlm: Vlm, chat: Chat, *, small: bool) -> dict[str, float]:
    """Prompt tokens a second, least seconds of a decoding step, and bytes that it reads a second.

    Steps are differences of two rounds, so that what a round costs once (waking up, sleeping) is not in them.
    """
    rows, tokens, more = (2, 40, 8) if small else (64, 1500, 64)
    prompts = [random_tree(chat, [], [1], text=tokens, seed=50 + row).prompt for row in range(rows + 1)]

    def seconds(given: Sequence[Prompt], length: int) -> float:
        started = time.perf_counter()
        engine.sample(given, chat.sampling(max_new_tokens=length))
        return time.perf_counter() - started

    once = seconds(prompts[:1], 1)
    prefill = seconds(prompts[1:], 1) - once
    single = (seconds(prompts[:1], 1 + more) - seconds(prompts[:1], 1)) / more
    many = (seconds(prompts[1:], 1 + more) - seconds(prompts[1:], 1)) / more
    text = vlm.model.config.get_text_config()
    element = vlm.model.dtype.itemsize
    language = sum(p.nbytes for name, p in vlm.model.named_parameters() if "visual" not in name)
    length = len(prompts[1].ids) + more // 2
    read = language + rows * length * token_bytes(text, element)
    found = {
        "round_s": once,
        "prefill_tokens": sum(len(prompt.ids) for prompt in prompts[1:]) / max(prefill, 1e-9),
    }
    return found | {"decode_step_s": single, "decode_read": read / many if many > 0 else 0.0}
