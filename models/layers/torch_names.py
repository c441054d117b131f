"""Names that PyTorch has for the variables of Flax NNX modules."""

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def torch_name(name: str) -> str:
    """Name of a variable as a tensor in a PyTorch state dict, where the modules are called the same.

    Args:
        name: Path of a parameter or a statistic, as ``smartfrz_jax.pytrees.paths`` gives it.

    Returns:
        The name.

    Example:
        >>> torch_name("blocks/0/norm/scale"), torch_name("norm/var")
        ('blocks.0.norm.weight', 'norm.running_var')
    """
    *modules, leaf = name.split("/")
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])
