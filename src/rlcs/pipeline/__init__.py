"""The whole study: cold start, SFT, GRPO, measurement, report; once, or with several seeds."""
