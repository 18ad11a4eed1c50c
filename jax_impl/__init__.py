"""The Flax NNX backend (twin: mlx_impl)."""

import ctypes
import sys

import jax

from common.reranker.prepare import cache_root

# A shape is compiled once on a machine, not once in every command.
jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next: page faults are a sixth of a step's time on CPU.

    One arena, no mmap, no trimming (malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD); elsewhere nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):
            mallopt(option, value)


_keep_freed_memory()
