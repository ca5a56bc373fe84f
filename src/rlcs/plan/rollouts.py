"""Memory and time of sampling: the local engine's cache or vLLM's share, and the seconds of a round."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.model.chunks import PREFILL_TOKENS
from rlcs.plan.decoding import StepCost, decode
from rlcs.plan.layers import Attention
from rlcs.plan.machine import GIB
from rlcs.plan.placement import Placement, servers_beside
from rlcs.plan.rates import Speeds
from rlcs.plan.shapes import Sizes
from rlcs.plan.work import Trees, language, vision

SHARED_LAYER_S = 3e-5
"""Seconds of the two all-reduces of a layer that several GPUs share, in a decoding step: a guess."""
VLLM_PASSES = 4 * GIB
"""Bytes of a GPU that vLLM keeps for its passes and CUDA graphs: a guess."""
SAMPLING = 32
SAMPLING_TOP_P = 52
"""Bytes that choosing a token takes for each row and vocabulary entry (`engines.sampling`)."""
VLLM_ASLEEP = 3 * GIB
"""Bytes of a GPU that a sleeping vLLM keeps: its context, libraries, CUDA graphs; a guess."""
VLLM_SHARE = 0.9
"""Share of a GPU that vLLM takes by default."""


def rollout_bytes(place: Placement, largest: Trees, *, prompts: int, top_p: float) -> float:
    """Bytes besides weights and optimiser on a device that answers `prompts` as large as `largest`.

    The local engine's cache grows by copying, so it counts twice; a sharded model is gathered to sample.
    """
    sizes, rollout = place.sizes, place.rollout
    if rollout.engine != "local":
        engines = 1 if rollout.engine == "vllm_colocated" else servers_beside(place)
        return engines * (rollout.share or VLLM_SHARE) * place.machine.device.memory * GIB
    rows = prompts * largest.group
    tokens = prompts * largest.trunk + rows * largest.answer
    kept, e = sizes.cache, place.compute
    cache = 2 * (kept.token_bytes(e) * tokens + kept.row_bytes(e) * (prompts + rows))
    choosing = rows * sizes.vocabulary * (SAMPLING if top_p == 1 else SAMPLING_TOP_P)
    prefill = min(max(PREFILL_TOKENS, largest.trunk), prompts * largest.trunk)
    patches = prefill * largest.patches // largest.trunk
    tower = patches * (sizes.vision.intermediate + sizes.vision.hidden)
    widest = max(layer.intermediate for layer in sizes.layers)
    passing = 3 * place.compute * max(prefill * (widest + sizes.hidden), tower)
    whole = sizes.total * place.compute if place.sharded else 0
    return float(cache + max(choosing, passing) + whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Seconds of one round of sampling on the slowest engine, and mean seconds at work over the engines.

    `arrivals` are the seconds after which the groups are complete, in the order of the groups.
    """

    prefill: float
    decode: float
    tail: float
    busy_prefill: float
    busy_decode: float
    arrivals: tuple[float, ...]
    slots: int


def engines_of(place: Placement) -> int:
    """The number of engines that sample."""
    rollout = place.rollout
    if rollout.engine == "vllm_server":
        return len(rollout.urls) or rollout.servers
    return max(1, place.trainers // (1 if rollout.engine == "local" else rollout.tensor_parallel))


def sampled(
    place: Placement, groups: Sequence[Sequence[int]], trees: Trees, speeds: Speeds, *, max_rows: int
) -> Sampled:
    """Sample groups of answers of these lengths, each on a prompt and image of `trees`."""
    engines = engines_of(place)
    own = [groups[number::engines] for number in range(min(engines, len(groups)))]
    cost, slots = step_cost(place, speeds), slots_of(place, trees, max_rows)
    # vLLM reads the prompt for each of its answers, the local engine once.
    trunk = trees.trunk / trees.group if place.rollout.engine == "local" else float(trees.trunk)
    done = [decode([n for group in part for n in group], cost, trunk=trunk, slots=slots) for part in own]
    each = prompt_seconds(place, trees, speeds)
    prefill = [len(part) * each for part in own]
    arrivals = [0.0] * len(groups)
    for number, (part, engine) in enumerate(zip(own, done, strict=True)):
        for index in range(len(part)):
            last = max(engine.ends[index * trees.group : (index + 1) * trees.group])
            arrivals[number + index * engines] = prefill[number] + last
    slowest = max(done, key=lambda engine: engine.seconds)
    return Sampled(
        prefill=max(prefill),
        decode=slowest.seconds,
        tail=slowest.tail,
        busy_prefill=sum(prefill) / engines,
        busy_decode=sum(engine.busy for engine in done) / engines,
        arrivals=tuple(arrivals),
        slots=slots,
    )


def prompt_seconds(place: Placement, trees: Trees, speeds: Speeds) -> float:
    """Seconds in which one engine reads a prompt with its image."""
    name = "forward_share" if place.rollout.engine == "local" else "prefill_share"
    work = language(place.sizes, trees.trunk, [])
    work += vision(place.sizes.vision, trees.patches) if trees.patches else 0.0
    return work / (place.peak * speeds[name] * _gpus_of_engine(place))


def step_cost(place: Placement, speeds: Speeds) -> StepCost:
    """The cost of one decoding step of an engine."""
    sizes, local = place.sizes, place.rollout.engine == "local"
    gpus, launching, depth = _gpus_of_engine(place), place.machine.gpus > 0, sizes.layers.total()
    least = speeds["decode_step_s"] + (depth * SHARED_LAYER_S if gpus > 1 else 0.0)
    if local:
        least = depth * speeds["local_layer_s"]
    size = 1 if place.rollout.quantization else place.compute  # fp8 has twice the peak, too
    faster = place.compute / size
    experts = sum(n * layer.experts for layer, n in sizes.layers.items())
    chosen = max(layer.chosen / max(1, layer.routed) for layer in sizes.layers)
    reading = speeds["decode_read"] * gpus
    share = speeds["forward_share" if local else "prefill_share"]
    return StepCost(
        weights=sizes.decoding_weights * size / reading,
        experts=experts * size / reading,
        chosen=chosen,
        row=2.0 * (sizes.decoding_weights + chosen * experts) / (faster * place.peak * share * gpus),
        cached_token=_read_by(sizes, windowed=False) * place.compute / reading,
        windowed_token=_read_by(sizes, windowed=True) * place.compute / reading,
        window=sizes.cache.window,
        state=2 * sizes.cache.row_bytes(place.compute) / reading,  # it is read and written
        least=least if launching else 0.0,
    )


def _read_by(sizes: Sizes, *, windowed: bool) -> int:
    """Keys and values of a token that layers with or without a window read, their own or others'."""
    found = ((layer.mixer, n) for layer, n in sizes.layers.items())
    return sum(2 * n * x.keys for x, n in found if isinstance(x, Attention) and (x.window > 0) == windowed)


def slots_of(place: Placement, trees: Trees, max_rows: int) -> int:
    """Answers that one engine decodes at once: as many as are allowed, and as vLLM's cache holds."""
    if place.rollout.engine == "local":
        return max(1, max_rows // trees.group) * trees.group
    if not place.machine.gpus or place.rollout.urls:
        return max_rows
    gpus = _gpus_of_engine(place)
    memory = gpus * (place.rollout.share or VLLM_SHARE) * place.machine.device.memory * GIB
    cache = memory - place.sizes.total * place.compute - gpus * VLLM_PASSES
    if place.rollout.quantization:
        experts = sum(n * layer.experts for layer, n in place.sizes.layers.items())
        cache += (place.sizes.decoding_weights + experts) * (place.compute - 1)
    kept = place.sizes.cache
    shared = kept.seen_bytes(trees.trunk, place.compute) / trees.group
    own = kept.seen_bytes(trees.trunk + trees.answer, place.compute) - kept.seen_bytes(
        trees.trunk, place.compute
    )
    a_row = shared + own + kept.row_bytes(place.compute)
    return max(1, min(max_rows, int(cache / a_row)))


def _gpus_of_engine(place: Placement) -> int:
    return 1 if place.rollout.engine == "local" else place.rollout.tensor_parallel
