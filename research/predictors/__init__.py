"""Predictors, fitted to recorded runs and judged on others."""
