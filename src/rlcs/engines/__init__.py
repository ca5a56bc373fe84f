"""Rollout engines: prompts in, rollouts out, grouped by prompt."""
