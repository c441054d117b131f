"""Blocks that an ``nnx.scan`` runs, of which some rows are frozen: the split scan, and evaluation mode row by row."""
