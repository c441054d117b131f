"""Modules of which parts of arrays are frozen: rows of blocks that an ``nnx.scan`` runs, and lookups in tables."""
