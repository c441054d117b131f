"""Texts for language models: tokens, sequences in which they are packed, and how well they are predicted."""
