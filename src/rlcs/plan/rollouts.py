"""What sampling takes: the cache of the local engine or vLLM's share, and the seconds of decoding."""

import math
from dataclasses import dataclass

from rlcs.engines.decoding import PREFILL_TOKENS
from rlcs.plan.machine import GIB, Machine
from rlcs.plan.shapes import Sizes, head_size
from rlcs.plan.storage import formats, is_sharded, servers_beside, trainers
from rlcs.recipe.schema import Recipe

READING = 0.6
"""Share of the memory bandwidth that decoding reaches."""
LAYER_S = 5e-4
"""Seconds that one layer's launches take at least in a decoding step of the local engine: a guess."""
SAMPLING = 32
SAMPLING_TOP_P = 52
"""Bytes that choosing a token takes for each row and word of the vocabulary (`engines.sampling`)."""
VLLM_SHARE = 0.9
"""Share of a GPU that vLLM takes when nothing is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trees:
    """`count` trees a step of `trunk` tokens with `patches` image patches and `group` answers of `answer`."""

    count: int
    trunk: int
    patches: int
    group: int
    answer: int

    @property
    def tokens(self) -> int:
        """Of one tree."""
        return self.trunk + self.group * self.answer


def rollout_bytes(
    recipe: Recipe, sizes: Sizes, machine: Machine, largest: Trees, *, prompts: int, top_p: float
) -> float:
    """Bytes beside weights and optimiser on a device while `prompts` as large as `largest` are answered.

    The local engine's cache grows by copying, so it counts twice; a sharded model is whole meanwhile.
    """
    engine = recipe.rollout.engine
    if engine != "local":
        engines = 1 if engine == "vllm_colocated" else servers_beside(recipe, machine)
        return engines * (recipe.rollout.memory_share or VLLM_SHARE) * machine.device.memory * GIB
    form, text = formats(recipe, machine), sizes.text
    rows = prompts * largest.group
    cache = 2 * _cache_token(sizes, form.compute) * (prompts * largest.trunk + rows * largest.answer)
    choosing = rows * text.vocab_size * (SAMPLING if top_p == 1 else SAMPLING_TOP_P)
    prefill = min(max(PREFILL_TOKENS, largest.trunk), prompts * largest.trunk)
    patches = prefill * largest.patches // largest.trunk
    tower = patches * (sizes.vision.intermediate + sizes.vision.hidden)
    passing = 3 * form.compute * max(prefill * (text.intermediate_size + text.hidden_size), tower)
    whole = sizes.total * form.compute if is_sharded(recipe, machine) else 0
    return float(cache + max(choosing, passing) + whole)


def decoding_seconds(recipe: Recipe, sizes: Sizes, machine: Machine, trees: Trees) -> float:
    """A decoding step reads the weights and the cache once; the local engine launches layer by layer."""
    rollout, form = recipe.rollout, formats(recipe, machine)
    local = rollout.engine == "local"
    copies = max(1, trainers(recipe, machine) // (1 if local else rollout.tensor_parallel))
    if rollout.engine == "vllm_server":
        copies = len(rollout.urls) or rollout.servers
    own = math.ceil(trees.count / copies)
    prompts = min(own, max(1, recipe.grpo.max_rows // trees.group))
    read = float(sizes.parameters["language_model"] * form.compute)
    read += prompts * _cache_token(sizes, form.compute) * (trees.trunk + trees.group * trees.answer / 2)
    speed = machine.device.bandwidth * READING * (1 if local else rollout.tensor_parallel)
    launching = sizes.text.num_hidden_layers * LAYER_S if local and machine.gpus else 0.0
    return math.ceil(own / prompts) * trees.answer * max(read / speed, launching)


def live_prompts(recipe: Recipe, machine: Machine) -> int:
    """Prompts of GRPO whose answers one device decodes at once: whole groups within max_rows."""
    grpo = recipe.grpo
    own = math.ceil(grpo.prompts_per_step / trainers(recipe, machine))
    return min(own, max(1, grpo.max_rows // grpo.group_size))


def _cache_token(sizes: Sizes, element: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    text = sizes.text
    width = text.num_key_value_heads * head_size(text)
    return int(2 * width * text.num_hidden_layers * element)
