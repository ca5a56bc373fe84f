"""The recipe: every choice of a run in one strict, documented file."""
