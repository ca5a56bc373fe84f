"""Measures what a plan needs to know: shares of the data sheet's peak, memory bandwidth, images a second."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from rlcs.data.sources import open_builtin
from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import device_name, free_bytes, peak_speed, seconds_of
from rlcs.doctor.gpu.models import (
    Shape,
    configuration,
    drawn,
    make_chat,
    operations,
    random_tree,
    random_vlm,
    shapes,
)
from rlcs.engines.local import LocalEngine
from rlcs.grading import GradePool
from rlcs.model.chat import Chat
from rlcs.model.image_features import image_inputs
from rlcs.model.loading import default_device
from rlcs.model.packing import Pack, pack
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.plan.shapes import Sizes
from rlcs.plan.skeleton import measure
from rlcs.records.trees import Tree

_SHARE_OF_MEMORY = 0.6
_TERA, _GIGA = 1e12, 1e9
_LEAST_SHARE = 0.05
"""A GPU that reaches less in matrix products is broken, throttled, or shared with others."""


def check(setting: Setting) -> Check:
    """Measure the device alone, then passes over a full pack on as deep a model as fits."""
    device = torch.device("cpu") if setting.cpu else default_device()
    peak, dtype = peak_speed(device), torch.float32 if setting.cpu else torch.bfloat16
    reached = _matrices(device, dtype, 512 if setting.cpu else 8192)
    bandwidth = _bandwidth(device, 1 << (24 if setting.cpu else 31))
    shape, sizes = deepest(setting, free_bytes(device))
    vlm = random_vlm(shape, device, dtype, checkpointing=True)
    chat = make_chat(vlm)
    trees = _full_pack(chat, small=setting.cpu)
    packed = pack(trees, chat.patches).to(device)
    passed = _passes(vlm, packed, device)
    work = operations(sizes, trees)
    speeds = {
        "forward": (work["language"] + work["vision"]) / passed["forward"],
        "update": 4 * (work["language"] + work["vision"]) / passed["update"],  # forward twice, backward
        "vision": work["vision"] / passed["vision"],
    }
    values = {
        "device": device_name(device),
        "model": shape.label,
        "layers": shape.layers,
        "blocks": shape.blocks,
    }
    values |= {
        "tokens": packed.num_tokens,
        "matrices_tflops": reached / _TERA,
        "copies_gbs": bandwidth / _GIGA,
    }
    values |= {f"{name}_s": seconds for name, seconds in passed.items()}
    values |= {f"{name}_tflops": speed / _TERA for name, speed in speeds.items()}
    rates = {"grades": _grades(), "local_layer_s": _local_step(vlm, chat) / shape.layers}
    rates |= {"images": _images(chat, 2 if setting.cpu else 16, (168, 168) if setting.cpu else (1240, 1000))}
    if peak is not None:
        rates |= {f"{name}_share": speed / peak for name, speed in speeds.items()}
        values |= {"peak_tflops": peak / _TERA, "model_flops_share": 0.75 * speeds["update"] / peak}
    if peak is not None and reached < _LEAST_SHARE * peak and not setting.cpu:
        message = f"matrix products reach {reached / peak:.1%} of the data sheet's peak"
        fix = "see nvidia-smi -q: is it throttled, capped, or used by others?"
        return Check(ok=False, message=message, fix=fix, values=values, rates=rates)
    return Check(
        ok=True, message=_sentence(speeds, reached, bandwidth, peak, shape), values=values, rates=rates
    )


def _sentence(
    speeds: dict[str, float], reached: float, bandwidth: float, peak: float | None, shape: Shape
) -> str:
    figures = {"matrix products": reached, **speeds}
    parts = [
        f"{name} {speed / _TERA:.3g} TFLOP/s" + (f" ({speed / peak:.0%} of peak)" if peak else "")
        for name, speed in figures.items()
    ]
    return f"{', '.join(parts)}; memory {bandwidth / _GIGA:.0f} GB/s; {shape.layers} layers of {shape.label}"


def deepest(setting: Setting, free: int) -> tuple[Shape, Sizes]:
    """The model with most layers, up to those of 7B, whose weights and gradients fit into free memory."""
    if setting.cpu:
        shape = shapes(setting)[0]
        return shape, measure(shape.name, configuration(shape))
    for shape, layers in ((shapes(setting)[1], 28), (shapes(setting)[0], 36)):
        whole = replace(shape, layers=layers, blocks=32, vocabulary=151936)
        sizes = measure(whole.name, configuration(whole))
        bytes_a_weight = 4  # in bfloat16, with gradients
        layer = sizes.largest_layer * bytes_a_weight
        fits = int(
            (_SHARE_OF_MEMORY * free - (sizes.total - layers * sizes.largest_layer) * bytes_a_weight) / layer
        )
        if fits >= 4:
            chosen = replace(whole, layers=min(layers, fits))
            return chosen, measure(chosen.name, configuration(chosen))
    smallest = replace(shapes(setting)[0], layers=2)
    return smallest, measure(smallest.name, configuration(smallest))


def _full_pack(chat: Chat, *, small: bool) -> list[Tree]:
    """Trees as of a run: on a GPU about 8,000 tokens, prompts of 1,100 and four answers of 700 each."""
    if small:
        return [random_tree(chat, [(168, 168)], [30, 40], seed=1)]
    return [random_tree(chat, [(840, 868)], [700] * 4, text=150, seed=seed) for seed in range(2)]


def _passes(vlm: Vlm, packed: Pack, device: torch.device) -> dict[str, float]:
    """Seconds of scoring, of a forward and backward pass, and of the vision tower alone."""

    def scoring() -> None:
        with torch.no_grad():
            score(vlm, packed)

    def learning() -> None:
        score(vlm, packed).logprobs.sum().backward()
        vlm.model.zero_grad(set_to_none=True)

    def seeing() -> None:
        with torch.no_grad():
            vlm.model.get_image_features(**image_inputs(vlm, packed))

    seconds = {"forward": seconds_of(scoring, device), "vision": seconds_of(seeing, device)}
    vlm.model.train()  # activations are recomputed
    return seconds | {"update": seconds_of(learning, device)}


def _matrices(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of products of square matrices."""
    layer = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    rows = torch.randn(size, size, device=device, dtype=dtype)
    repeats = 10

    def work() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                layer(rows)

    return repeats * 2.0 * size**3 / seconds_of(work, device)


def _bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy inside the device's memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731
    return 2 * size / seconds_of(copy, device)


def _local_step(vlm: Vlm, chat: Chat) -> float:
    """Seconds of a decoding step of the local engine with one row."""
    engine, prompts = LocalEngine(vlm, chat, max_rows=1), [random_tree(chat, [], [1], seed=9).prompt]

    def seconds(tokens: int) -> float:
        sampling = replace(chat.sampling(max_new_tokens=tokens), stop_ids=())
        return seconds_of(lambda: engine.sample(prompts, sampling), vlm.device, repeats=1)

    return max(1e-6, (seconds(25) - seconds(1)) / 24)


def _grades() -> float:
    """Answers a second that one grader process grades by the rule."""
    problems = open_builtin("builtin:puzzles?count=50&seed=1", "rl")
    answers = [(problem, f"so it is \\boxed{{{problem.answer}}}") for problem in problems]
    with GradePool(workers=1, deadline_s=5.0, allow_fallbacks=False) as pool:
        pool.grade(answers[:1])  # the process starts
        started = time.perf_counter()
        pool.grade(answers)
        return len(answers) / (time.perf_counter() - started)


def _images(chat: Chat, count: int, size: tuple[int, int]) -> float:
    """Images a second that this process decodes, resizes and cuts into patches."""
    refs = [drawn(*size, seed=100 + index, kind="JPEG") for index in range(count + 1)]
    chat.patches(refs.pop())  # what the first one alone costs
    started = time.perf_counter()
    for ref in refs:
        chat.patches(ref)
    return count / (time.perf_counter() - started)
