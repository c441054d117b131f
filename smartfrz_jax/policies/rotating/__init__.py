"""Policies whose frozen sets return: a few blocks train at a time, and take turns."""
