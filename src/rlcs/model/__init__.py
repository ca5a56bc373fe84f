"""From a problem to the logprobs of its answers: loading, chat format, images, packing, attention, policy."""
