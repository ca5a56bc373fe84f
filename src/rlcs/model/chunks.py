"""How much is computed at once, for training, sampling and the plans of both. Imports no torch."""

LOGIT_CHUNK = 1 << 26
"""Logits (elements) held at once: 64 Mi, 256 MiB in fp32."""
DELTA_CHUNK = 32
"""Tokens of a chunk of the delta rule: more are slower on a CPU, and short branches are padded to them."""
PREFILL_TOKENS = 16384
"""Prompt tokens prefilled in one forward pass."""
