"""Memory and time of sampling: the local engine's cache or vLLM's share, and the seconds of decoding."""

import math

from rlcs.engines.cache import token_bytes
from rlcs.engines.decoding import PREFILL_TOKENS
from rlcs.plan.machine import GIB
from rlcs.plan.placement import Placement, servers_beside
from rlcs.plan.work import Trees

READING = 0.6
"""Reached share of the memory bandwidth in decoding."""
LAYER_S = 5e-4
"""Least seconds of one layer's kernel launches in a decoding step of the local engine: a guess."""
SAMPLING = 32
SAMPLING_TOP_P = 52
"""Bytes that choosing a token takes for each row and vocabulary entry (`engines.sampling`)."""
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


def decoding_seconds(place: Placement, trees: Trees, *, max_rows: int) -> float:
    """Seconds of decoding: each step reads the weights and the cache once, or waits for kernel launches."""
    sizes, text, rollout = place.sizes, place.sizes.text, place.rollout
    local = rollout.engine == "local"
    copies = max(1, place.trainers // (1 if local else rollout.tensor_parallel))
    if rollout.engine == "vllm_server":
        copies = len(rollout.urls) or rollout.servers
    own = math.ceil(trees.count / copies)
    prompts = min(own, max(1, max_rows // trees.group))
    read = float(sizes.parameters["language_model"] * place.compute)
    read += prompts * token_bytes(text, place.compute) * (trees.trunk + trees.group * trees.answer / 2)
    speed = place.machine.device.bandwidth * READING * (1 if local else rollout.tensor_parallel)
    launching = sizes.text.num_hidden_layers * LAYER_S if local and place.machine.gpus else 0.0
    return math.ceil(own / prompts) * trees.answer * max(read / speed, launching)
