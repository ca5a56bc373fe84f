"""Does a recipe fit a machine, what does a step take, and what to change: without loading the model."""
