#!/usr/bin/env python3
"""`vllm` for a CPU with two things that its own lacks there, and that it has on a GPU.

Gated delta nets run in fp32, where its kernels take bfloat16 alone. Replaced is the core of a layer
(`cpu_gdn_attention_core`): the convolution and the rule, over vLLM's own caches of states. Projections,
gates, norms, cache slots and everything else stay vLLM's. And new weights of experts are packed as the first
ones are.
"""

import torch
from torch.nn import functional
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name


def core(
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    core_attn_out: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    """One sequence after the other; see vLLM's own function for the arguments."""
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    batch = context.attn_metadata[layer.prefix]
    starts = batch.non_spec_query_start_loc.tolist()
    for i, slot in enumerate(batch.non_spec_state_indices_tensor.tolist()[: len(starts) - 1]):
        continues = i < batch.num_decodes or bool(batch.has_initial_state[i])
        last, state = (cache[slot] for cache in layer.kv_cache)  # (taps - 1, C), (H, value size, key size)
        if not continues:
            last.zero_()
            state.zero_()
        tokens = slice(starts[i], starts[i + 1])
        seen = torch.cat([last, mixed_qkv[tokens]])
        last.copy_(seen[-len(last) :])
        mixed = functional.silu(
            functional.conv1d(seen.T[None], layer.conv1d.weight, groups=seen.shape[1])[0].T
        )
        query, key, value = (
            x.reshape(1, len(mixed), -1, x.shape[-1]) for x in layer.rearrange_mixed_qkv(mixed)
        )
        query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (query, key))
        decay = -layer.A_log.exp() * functional.softplus(a[tokens].float() + layer.dt_bias)
        read, after = torch_recurrent_gated_delta_rule(
            query,
            key,
            value,
            g=decay[None],
            beta=b[tokens].sigmoid()[None],
            initial_state=state.transpose(-1, -2)[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        state.copy_(after[0].transpose(-1, -2))
        core_attn_out[tokens] = read[0]


own_setup = UnquantizedFusedMoEMethod._setup_kernel


def setup(self, *, layer: torch.nn.Module, w13: torch.Tensor, w2: torch.Tensor) -> None:
    again = self.moe_kernel is not None
    own_setup(self, layer=layer, w13=w13, w2=w2)
    if again:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


gdn_attention.cpu_gdn_attention_core = core
UnquantizedFusedMoEMethod._setup_kernel = setup

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
