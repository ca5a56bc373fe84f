"""Checks vLLM: it starts, sees images, agrees on logprobs, takes new weights, sleeps and wakes up.

The model is random, with real layers, as deep as memory allows. vLLM's logprobs may differ from ours by three
times what our own do between the number format and float32.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import free_bytes, peak_speed, synchronize
from rlcs.doctor.gpu.models import (
    Shape,
    configuration,
    make_chat,
    operations,
    random_tree,
    random_vlm,
    shapes,
)
from rlcs.engines.base import Engine
from rlcs.engines.factory import EngineNeeds, open_engines
from rlcs.engines.vllm.protocol import BAN
from rlcs.model import attention
from rlcs.model.chat import Chat
from rlcs.model.image_features import image_inputs
from rlcs.model.loading import default_device
from rlcs.model.packing import pack
from rlcs.model.policy import hidden_states
from rlcs.model.vlm import Vlm
from rlcs.plan.skeleton import measure
from rlcs.recipe.sampling import Rollouts
from rlcs.records import Prompt, Rollout
from rlcs.records.trees import Branch, Tree

FACTOR = 3.0
_LEAST = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Mean differences of logprobs (nats) that are rounding in any case."""
_NOISE = 0.3
"""New weights are the old ones with so much noise, relative to their size."""
_CPU_SHARE = 0.1
"""Share of main memory for vLLM on a CPU."""
_LEAST_FREED = 0.5
"""Least share of its memory that vLLM frees while it sleeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answers:
    """Answers of vLLM to two prompts that differ in their images alone, and the seconds for them."""

    prompts: Sequence[Prompt]
    groups: Sequence[tuple[Rollout, ...]]
    seconds: float


def rollouts(setting: Setting) -> Rollouts | None:
    """How vLLM is started here: on the GPU that trains, asleep meanwhile; None: it is not here."""
    if not setting.executable:
        return None
    limits: dict[str, Any] = {"start_limit_s": 600.0, "dead_limit_s": 60.0, "max_tries": 2}
    limits |= {"memory_share": _CPU_SHARE} if setting.cpu else {}
    return Rollouts(engine="vllm_colocated", executable=setting.executable, **limits)


def check(setting: Setting) -> Check:
    """Start vLLM, then one question after the other."""
    settings = rollouts(setting)
    if settings is None:
        fix = "python3 -m venv vllm-env && vllm-env/bin/pip install 'vllm>=0.32', "
        fix += "then --executable vllm-env/bin/vllm"
        return Check(ok=None, message="vLLM is not here", fix=fix)
    device = torch.device("cpu") if setting.cpu else default_device()
    shape = _shape(setting, free_bytes(device))
    vlm = random_vlm(shape, device, torch.float32 if setting.cpu else torch.bfloat16)
    chat = make_chat(vlm)
    needs = EngineNeeds(settings=settings, max_tokens=2048, max_rows=64)
    with open_engines(needs, Path(setting.folder) / "vllm") as make:
        trial = _Trial(make(vlm, chat, 64), vlm, chat, shape)
        trial.run()
    values = {"engine": settings.engine, "model": shape.label, "layers": shape.layers, **trial.values}
    if trial.problems:
        fix = "use vLLM 0.32 or newer (see docs/reference/versions.md), or rollout.engine=local"
        return Check(ok=False, message="; ".join(trial.problems), fix=fix, values=values, rates=trial.rates)
    message = (
        f"starts in {values['start_s']:.0f} s, logprobs within {values['gap']:.1e} nats of ours "
        f"(limit {values['limit']:.1e}; with the other image {values['other_image_gap']:.1e}), "
        f"new weights in {values['new_weights_s']:.1f} s (within {values['new_gap']:.1e} nats), "
        f"sleeps in {values['sleep_s']:.1f} s"
    )
    return Check(ok=True, message=message, values=values, rates=trial.rates)


def _shape(setting: Setting, free: int) -> Shape:
    """3B, whole where a third of free memory holds it, for real seconds a token; else few layers."""
    shape = shapes(setting)[0]
    if setting.cpu:
        return shape
    whole = replace(shape, layers=36, blocks=32, vocabulary=151936)
    fits = 2 * measure(whole.name, configuration(whole)).total < free / 3
    return whole if fits else replace(shape, layers=4)


class _Trial:
    """Questions to one vLLM: what is wrong, the values, and the rates of a plan."""

    def __init__(self, engine: Engine, vlm: Vlm, chat: Chat, shape: Shape) -> None:
        self._engine, self._vlm, self._chat, self._shape = engine, vlm, chat, shape
        self._small = vlm.device.type == "cpu"
        self._free_before = free_bytes(vlm.device)
        self.problems: list[str] = []
        self.values: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def run(self) -> None:
        """Ask everything, in this order: each question needs the answers before it."""
        self.values["start_s"] = self.rates["start_s"] = self._seconds(new_weights=True)
        self._agreement()
        self._new_weights()
        self._sleep()
        self._speeds()

    def _require(self, holds: bool, problem: str) -> None:
        self.problems += [] if holds else [problem]

    def _seconds(
        self, *, new_weights: bool = False, prompts: Sequence[Prompt] = (), tokens: int = 1
    ) -> float:
        """Seconds of a round of answers with this many tokens, with new weights before them or not."""
        started = time.perf_counter()
        if new_weights:
            self._engine.sync()
        sampling = self._chat.sampling(max_new_tokens=tokens)
        self._engine.sample(prompts or _prompts(self._chat)[:1], sampling)
        return time.perf_counter() - started

    def _agreement(self) -> None:
        """Logprobs are ours, and change with the image."""
        answers, values = _sample(self._engine, self._chat), self.values
        values["answers_s"] = answers.seconds
        values["gap"] = gap = _gap(self._vlm, self._chat, answers.prompts, answers.groups)
        values["limit"] = limit = _limit(self._vlm, self._chat, answers)
        self._require(gap <= limit, f"vLLM's logprobs are {gap:.2g} nats from ours (limit {limit:.2g})")
        values["other_image_gap"] = _gap(self._vlm, self._chat, answers.prompts[::-1], answers.groups)
        what = "another image changes no logprobs: vLLM or the model does not see it"
        self._require(values["other_image_gap"] > limit, what)

    def _new_weights(self) -> None:
        """Answers follow new weights."""
        vlm, values, limit = self._vlm, self.values, 2 * self.values["limit"]
        before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
        _change(vlm)
        values["new_weights_s"] = seconds = self._seconds(new_weights=True)
        answers = _sample(self._engine, self._chat)
        values["new_gap"] = gap = _gap(vlm, self._chat, answers.prompts, answers.groups)
        vlm.model.load_state_dict(before)
        old = _gap(vlm, self._chat, answers.prompts, answers.groups)
        self._require(gap <= limit, f"after new weights vLLM is {gap:.2g} nats from ours (limit {limit:.2g})")
        self._require(old > values["limit"], "the answers do not follow new weights")
        size = sum(parameter.nbytes for parameter in vlm.model.parameters())
        self.rates["weights_to_vllm"] = size / max(seconds - self._seconds(), 1e-3)

    def _sleep(self) -> None:
        """Memory is free while it sleeps, and it answers again afterwards."""
        values, device = self.values, self._vlm.device
        awake = free_bytes(device)
        started = time.perf_counter()
        self._engine.rest()
        values["sleep_s"] = time.perf_counter() - started
        asleep = free_bytes(device)
        values |= {"used_gb": _gb(self._free_before - awake), "freed_gb": _gb(asleep - awake)}
        asleep_s, awake_s = self._seconds(new_weights=True), self._seconds(new_weights=True)
        values["wake_s"] = asleep_s - awake_s
        if not self._small:
            freed = (asleep - awake) / max(1, self._free_before - awake)
            self._require(freed > _LEAST_FREED, f"asleep vLLM frees {freed:.0%} of its memory")
            self.rates |= {"sleep_s": values["sleep_s"], "wake_s": values["wake_s"]}

    def _speeds(self) -> None:
        """Share of the peak while it reads prompts, least seconds of a decoding step, bytes read by one.

        Steps are differences of two rounds, so that what a round costs once is not in them.
        """
        vlm, sizes = self._vlm, measure(self._shape.name, configuration(self._shape))
        rows, more, side = (2, 8, (336, 336)) if self._small else (48, 64, (840, 868))
        trees = [random_tree(self._chat, [side], [1], text=150, seed=50 + row) for row in range(rows)]
        prompts = [tree.prompt for tree in trees]
        prefill = self._seconds(prompts=prompts) - self._seconds()
        one = (self._seconds(tokens=1 + more) - self._seconds()) / more
        many = (self._seconds(prompts=prompts, tokens=1 + more) - self._seconds(prompts=prompts)) / more
        read = sizes.parameters["language_model"] * vlm.model.dtype.itemsize
        length = sum(len(prompt.ids) + more // 2 for prompt in prompts)
        read += length * sizes.cache.token_bytes(vlm.model.dtype.itemsize)
        self.values |= {"prefill_s": prefill, "step_s": one, f"step_of_{rows}_s": many}
        self.rates |= {"decode_step_s": one, "decode_read": read / many if many > 0 else 0.0}
        if (peak := peak_speed(vlm.device)) and prefill > 0:
            self.rates["prefill_share"] = sum(operations(sizes, trees).values()) / prefill / peak


def _gb(size: float) -> float:
    return round(size / 2**30, 2)


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
        logits = vlm.logits(states[packed.predictors]).float()
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
    _cast(vlm, torch.float32)  # exact, also on the way back
    exact = _scored(vlm, chat, answers.prompts, answers.groups)
    _cast(vlm, dtype)
    return max(FACTOR * float((rough - exact).abs().mean()), _LEAST[dtype])


def _cast(vlm: Vlm, dtype: torch.dtype) -> None:
    """Cast the weights, and not the buffers: the rotary frequencies stay exact."""
    for parameter in vlm.model.parameters():
        parameter.data = parameter.data.to(dtype)


def _change(vlm: Vlm) -> None:
    """Add noise to the weights."""
    generator = torch.Generator(device=vlm.device).manual_seed(5)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.dim() >= 2:
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(noise * parameter.float().std().to(parameter.dtype), alpha=_NOISE)
    synchronize(vlm.device)
