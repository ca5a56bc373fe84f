"""RL with Cold Start: two-stage training of vision-language models on trees of answers."""
