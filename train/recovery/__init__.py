"""What keeps a run from being lost: checkpoints, going on from them, and what ends a run in good order."""
