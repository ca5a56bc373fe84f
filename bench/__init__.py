"""One GRPO step, measured against a peer: `python -m bench`."""
