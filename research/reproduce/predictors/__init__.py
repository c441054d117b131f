"""Predictors that differ in one thing, for Tables 4 and 5 and for questions that the paper leaves."""
