"""Publishes models: export to a Hugging Face folder, model card, checks of its files, upload."""
