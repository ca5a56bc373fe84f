"""Plans a recipe on a machine without loading the model: memory, work, time, and changes that make it fit."""
