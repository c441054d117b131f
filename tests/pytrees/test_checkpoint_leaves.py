"""Every kind of leaf comes back from a checkpoint bit for bit, whether ``jax.jit`` has made an array of it or not."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.pytrees import checkpoint, checkpoint_leaves

# All that JAX has but for those that XLA's CPU backend has not.
SCALARS = [getattr(jnp, name) for name in dir(jnp) if type(getattr(jnp, name)).__name__ == "_ScalarMeta"]
DTYPES = sorted({str(jnp.dtype(scalar)) for scalar in SCALARS} - {"float6_e2m3fn", "float6_e3m2fn", "int1", "uint1"})
WIDE = ("int64", "uint64", "float64", "complex128")


def leaves(*, x64: bool) -> dict:
    """Leaves of Python, NumPy and JAX as a run has them before its first step."""
    tree = {
        "int": 7, "negative": -3, "float": 1 / 3, "nan": float("nan"), "infinite": float("inf"), "bool": True,
        "complex": complex(1 / 3, -0.0), "float64": np.float64(1 / 3), "int64": np.int64(2**31 - 1), "bool_": np.True_,
        "doubles": np.array([1 / 3, np.nan]), "longs": np.array(5), "float16": np.float16(1 / 3),
        "key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "legacy key": jax.random.PRNGKey(5), "weak": jnp.asarray(2), "weak floats": jnp.asarray(1 / 3) * jnp.ones(()),
        "empty": np.zeros((0, 2)), "empty weak": jnp.broadcast_to(jnp.asarray(1.0), (0,)),
    }  # fmt: skip
    for dtype in DTYPES:
        if x64 or dtype not in WIDE:
            some = np.array([1, 0, 1]).astype(jnp.dtype(dtype))
            tree |= {
                f"{dtype} array": jnp.asarray(some),
                f"{dtype} of numpy": some,
                f"{dtype} scalar": jnp.asarray(some[0]),
            }
    return tree


def bits(leaf):
    """All that makes a leaf what it is."""
    if checkpoint_leaves.is_python(leaf):
        return type(leaf), repr(leaf)
    kind = "jax" if isinstance(leaf, jax.Array) else type(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    return kind, str(leaf.dtype), leaf.shape, getattr(leaf, "weak_type", False), np.asarray(leaf).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["32 bits", "64 bits"])
def test_every_kind_of_leaf_comes_back_whether_saved_or_restored_before_or_after_jit(tmp_path, x64):
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        fresh = leaves(x64=x64)
        jitted = jax.jit(lambda tree: tree)(fresh)
        everywhere = [(saved, like) for saved in (fresh, jitted) for like in (fresh, jitted)]
        for saved, like in [*everywhere, (jitted, checkpoint.outline(jitted))]:
            path = tmp_path / ("fresh" if saved is fresh else "jitted")
            if not path.exists():
                checkpoint.write(path, saved, "tree", {})
            got = checkpoint.read(path, like, "tree")
            same = [name for name in saved if saved is like or type(like[name]) is type(saved[name])]
            assert not [name for name in same if bits(got[name]) != bits(saved[name])]
            # NumPy's arrays come in place of NumPy's, and are no other numbers.
            again, expected = (jax.jit(lambda tree: tree)(one) for one in (got, saved))
            assert not [name for name in saved if bits(again[name]) != bits(expected[name])]


def note(leaf):
    shape, dtype = checkpoint_leaves.described(leaf)
    return checkpoint_leaves.note(leaf) or {"shape": shape, "dtype": dtype}


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (1, True), (True, 1), (1, 1.0), (1.0, 1), (1.0, 1j), ("a", 1), (1, "a"), (1, jnp.float32(1)),
        (1, jnp.ones(1, int)),
        (True, jnp.int32(1)), (1, jnp.bool_(True)), (1.5, jnp.complex64(1)), (jnp.float32(1), 1), (jnp.int32(1), 1.0),
        (jnp.int32(1), True), (jnp.bool_(True), 1), (jnp.ones(1), 1.0), (jnp.float32(1), "a"), (1, jax.random.key(0)),
        (jax.random.key(0), 1), (jnp.float32(1), jnp.bfloat16(1)), (np.float64(1), jnp.bfloat16(1)),
        (jnp.bfloat16(1), np.float64(1)), (np.float64(1), np.float32(1)),
        (np.zeros(2), jnp.zeros(3)), (np.int64(1), jnp.uint32(1)), (np.int64(1), 1.0),
    ],
)  # fmt: skip
def test_what_jit_does_not_make_of_a_leaf_does_not_fit(saved, like):
    assert not checkpoint_leaves.fits(note(saved), like)


def test_64_bits_are_not_cut_to_32(tmp_path):
    with jax.enable_x64(True):
        tree = {"a": jnp.asarray(1 / 3) + 0.0, "long": jnp.asarray(np.array([2**40 + 1]))}
        like = checkpoint.outline(tree)
        checkpoint.write(tmp_path / "x", tree, "tree", {})
    with pytest.raises(ValueError, match=r"has float64\[\] for \['a'\], which would .* under jax.enable_x64\(True\)"):
        checkpoint.read(tmp_path / "x", like, "tree")
    got = checkpoint.read(tmp_path / "x", {"a": np.zeros(()), "long": np.zeros(1, int)}, "tree")
    assert (got["a"], got["long"]) == (1 / 3, 2**40 + 1)


def test_64_bits_come_onto_the_devices_of_the_template(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with jax.enable_x64(True):
        tree = {"a": jax.device_put(np.arange(16.0) / 3, split)}
        checkpoint.write(tmp_path / "x", tree, "tree", {})
        got = checkpoint.read(tmp_path / "x", tree, "tree")["a"]
    assert got.sharding == split
    np.testing.assert_array_equal(got, np.arange(16.0) / 3, strict=True)


def test_gradients_of_integers(tmp_path):
    tree = {"none": np.zeros((2,), jax.dtypes.float0), "some": jnp.ones(2)}
    checkpoint.write(tmp_path / "x", tree, "tree", {})
    got = checkpoint.read(tmp_path / "x", tree, "tree")["none"]
    assert (got.shape, got.dtype) == ((2,), jax.dtypes.float0)


@pytest.mark.parametrize("leaf", [np.array(["a"]), np.array([object()]), np.datetime64(1, "s"), object()])
def test_arrays_of_anything_but_numbers_are_refused_by_name(tmp_path, leaf):
    with pytest.raises(TypeError, match=r"tree: \['odd'\] is \w+.*, expected an array or a number; make it"):
        checkpoint.write(tmp_path / "x", {"odd": leaf, "even": jnp.ones(2)}, "tree", {})
    assert not (tmp_path / "x").exists()
