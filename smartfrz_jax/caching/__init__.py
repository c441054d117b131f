"""The frozen front of a network, computed once for each example."""
