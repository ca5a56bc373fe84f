"""The whole study: cold start, SFT, GRPO, measurement, report."""
