"""Memory and time of sampling: the local engine's cache or vLLM's share, and the seconds of a round."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.engines.cache import token_bytes
from rlcs.engines.decoding import PREFILL_TOKENS
from rlcs.plan.decoding import StepCost, decode
from rlcs.plan.machine import GIB
from rlcs.plan.placement import Placement, servers_beside
from rlcs.plan.rates import Speeds
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
    sizes, text, rollout = place.sizes, place.sizes.text, place.rollout
    if rollout.engine != "local":
        engines = 1 if rollout.engine == "vllm_colocated" else servers_beside(place)
        return engines * (rollout.share or VLLM_SHARE) * place.machine.device.memory * GIB
    rows = prompts * largest.group
    cache = 2 * token_bytes(text, place.compute) * (prompts * largest.trunk + rows * largest.answer)
    choosing = rows * text.vocab_size * (SAMPLING if top_p == 1 else SAMPLING_TOP_P)
    prefill = min(max(PREFILL_TOKENS, largest.trunk), prompts * largest.trunk)
    patches = prefill * largest.patches // largest.trunk
    tower = patches * (sizes.vision.intermediate + sizes.vision.hidden)
    passing = 3 * place.compute * max(prefill * (text.intermediate_size + text.hidden_size), tower)
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
    work = language(place.sizes.text, trees.trunk, [])
    work += vision(place.sizes.vision, trees.patches) if trees.patches else 0.0
    return work / (place.peak * speeds[name] * _gpus_of_engine(place))


def step_cost(place: Placement, speeds: Speeds) -> StepCost:
    """The cost of one decoding step of an engine."""
    text, local = place.sizes.text, place.rollout.engine == "local"
    gpus, launching = _gpus_of_engine(place), place.machine.gpus > 0
    least = speeds["decode_step_s"] + (text.num_hidden_layers * SHARED_LAYER_S if gpus > 1 else 0.0)
    if local:
        least = text.num_hidden_layers * speeds["local_layer_s"]
    weights = place.sizes.decoding_weights
    size = 1 if place.rollout.quantization else place.compute  # fp8 has twice the peak, too
    faster = place.compute / size
    return StepCost(
        weights=weights * size / (speeds["decode_read"] * gpus),
        row=2.0
        * weights
        / (faster * place.peak * speeds["forward_share" if local else "prefill_share"] * gpus),
        cached_token=token_bytes(text, place.compute) / (speeds["decode_read"] * gpus),
        least=least if launching else 0.0,
    )


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
        cache += place.sizes.decoding_weights * (place.compute - 1)
    a_row = token_bytes(place.sizes.text, place.compute) * (trees.trunk / trees.group + trees.answer)
    return max(1, min(max_rows, int(cache / a_row)))


def _gpus_of_engine(place: Placement) -> int:
    return 1 if place.rollout.engine == "local" else place.rollout.tensor_parallel
