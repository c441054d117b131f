"""Freezing policies: when to stop updating which layer."""

from smartfrz_jax.policies.base import Policy as Policy
