"""Training scripts, run from the repository: ``python -m train.demo``."""
