"""Programs that make what rlcs ships; none of them is part of the package."""
