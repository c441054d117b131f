"""Policies that compare what layers put out."""
