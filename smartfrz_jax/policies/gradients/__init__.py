"""Policies that look at gradients."""
