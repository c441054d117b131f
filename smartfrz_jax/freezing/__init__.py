"""The frozen set, the optimizer that leaves it out, and the loop that changes it."""
