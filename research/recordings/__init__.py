"""Recorded runs, from which predictors learn."""
