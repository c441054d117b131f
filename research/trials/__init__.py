"""Trainings with freezing, against the same ones without."""
