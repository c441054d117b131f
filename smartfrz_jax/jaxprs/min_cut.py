"""The cheapest set of values that separates what must be computed once from what reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple


class _Edge(NamedTuple):
    target: int
    back: int  # position of the reverse edge in the edges of the target


def min_cut(
    costs: Mapping[Hashable, int],
    edges: Iterable[tuple[Hashable, Hashable]],
    sources: Iterable[Hashable],
    sinks: Iterable[Hashable],
) -> list[Hashable]:
    """Nodes of the least total cost such that every path from a source to a sink goes through one of them.

    Maximum flow by Dinic's algorithm in the graph in which every node is an edge as wide as it is expensive. Of several
    cheapest cuts the one closest to the sinks is returned.

    Args:
        costs: Cost of each node, a non-negative integer.
        edges: Pairs of nodes, from the one that is read to the one that reads it.
        sources: Nodes on which paths begin; they may be cut themselves.
        sinks: Nodes on which paths end; they may be cut themselves.

    Returns:
        The nodes of the cut, in the order of ``costs``.

    References:
        Dinitz, Algorithm for solution of a problem of maximum flow in networks with power estimation, 1970.

    Example:
        >>> min_cut({"a": 4, "b": 1, "c": 4}, [("a", "b"), ("b", "c")], ["a"], ["c"])
        ['b']
    """
    index = {node: i for i, node in enumerate(costs)}
    total = sum(costs.values()) + 1  # as good as infinite
    source, sink = 2 * len(index), 2 * len(index) + 1
    network = _Network(2 * len(index) + 2)
    for node, i in index.items():
        network.connect(2 * i, 2 * i + 1, costs[node])
    for node, reader in edges:
        network.connect(2 * index[node] + 1, 2 * index[reader], total)
    for node in dict.fromkeys(sources):
        network.connect(source, 2 * index[node], total)
    for node in dict.fromkeys(sinks):
        network.connect(2 * index[node] + 1, sink, total)
    network.saturate(source, sink)
    behind = network.reaching(sink)
    return [node for node, i in index.items() if 2 * i not in behind and 2 * i + 1 in behind]


class _Network:
    """Edges of every vertex, and how much more can flow through each."""

    def __init__(self, n: int):
        self.edges: list[list[_Edge]] = [[] for _ in range(n)]
        self.residual: list[list[int]] = [[] for _ in range(n)]

    def connect(self, start: int, end: int, capacity: int) -> None:
        self.edges[start].append(_Edge(end, len(self.edges[end])))
        self.residual[start].append(capacity)
        self.edges[end].append(_Edge(start, len(self.edges[start]) - 1))
        self.residual[end].append(0)

    def saturate(self, source: int, sink: int) -> None:
        """Sends as much through the network as it can take."""
        while sink in (level := self._levels(source)):
            following = [0] * len(self.edges)  # the edge to try next, of every vertex
            while path := self._path(source, sink, level, following):
                flow = min(self.residual[vertex][at] for vertex, at in path)
                for vertex, at in path:
                    edge = self.edges[vertex][at]
                    self.residual[vertex][at] -= flow
                    self.residual[edge.target][edge.back] += flow

    def reaching(self, sink: int) -> set[int]:
        """Vertices from which more could still flow to the sink."""
        found, todo = {sink}, [sink]
        while todo:
            vertex = todo.pop()
            for edge in self.edges[vertex]:
                if edge.target not in found and self.residual[edge.target][edge.back] > 0:
                    found.add(edge.target)
                    todo.append(edge.target)
        return found

    def _levels(self, source: int) -> dict[int, int]:
        level, todo = {source: 0}, deque([source])
        while todo:
            vertex = todo.popleft()
            for at, edge in enumerate(self.edges[vertex]):
                if edge.target not in level and self.residual[vertex][at] > 0:
                    level[edge.target] = level[vertex] + 1
                    todo.append(edge.target)
        return level

    def _path(self, source: int, sink: int, level: dict[int, int], following: list[int]) -> list[tuple[int, int]]:
        path: list[tuple[int, int]] = []
        vertex = source
        while vertex != sink:
            if following[vertex] == len(self.edges[vertex]):
                if not path:
                    return []
                vertex, _ = path.pop()
                following[vertex] += 1
                continue
            at = following[vertex]
            edge = self.edges[vertex][at]
            if self.residual[vertex][at] > 0 and level.get(edge.target) == level[vertex] + 1:
                path.append((vertex, at))
                vertex = edge.target
            else:
                following[vertex] += 1
        return path
