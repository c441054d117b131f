"""How often a run that is killed at any moment ends as one that never was."""
