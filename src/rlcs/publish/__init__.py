"""From a run to people: a Hugging Face folder (`export`), an honest card, and what may be sent (`checks`)."""
