"""Counts how often NNX takes modules apart."""

from flax.nnx import graphlib


class Flattenings:
    """How often modules were taken apart or put together since this was made."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("flatten", "unflatten"):
            monkeypatch.setattr(graphlib, name, self.counted(getattr(graphlib, name)))
        for context, name in ((graphlib.SplitContext, "flatten"), (graphlib.MergeContext, "unflatten")):
            monkeypatch.setattr(context, name, self.counted(getattr(context, name)))

    def counted(self, function):
        def counting(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counting
