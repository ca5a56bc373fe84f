"""Losses, batching, the trainer, checkpoints, a stage's run directory, and the two stages: SFT and GRPO."""
