"""How XLA compiles programs in tests: fast, and where operations of fused programs are counted as it does for users."""

from importlib.metadata import version

# jaxlib 0.11 has only the newer emitters of fused operations, and stops at the flag.
_OLDER_EMITTERS = version("jaxlib").startswith("0.10.")

# LLVM's optimizations take a third of the time of all tests, the newer emitters a third of what is left to compiling,
# and a program cut into up to 32 modules another third of that; their results are the same bits.
_OLDER = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FAST = "--xla_backend_optimization_level=0" + (_OLDER if _OLDER_EMITTERS else "")

# What is fused depends on the emitters: options for `jax.jit` where that counts.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if _OLDER_EMITTERS else {}
