"""Compiled train steps: made ahead of need, called, kept on disk."""
