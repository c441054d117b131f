"""Stacked parameters of which some rows are frozen: the split scan, and the rows that an optimizer sees."""
