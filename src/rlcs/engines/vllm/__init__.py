"""Rollouts by vLLM: servers, a colocated engine, and how new weights reach them."""
