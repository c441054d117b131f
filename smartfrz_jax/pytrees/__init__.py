"""Names of leaves, arrays on several hosts, checkpoints, and checks of arguments."""
