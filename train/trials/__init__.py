"""Policies in the closed loop: what freezing by each of them saves, and what it costs in accuracy."""
