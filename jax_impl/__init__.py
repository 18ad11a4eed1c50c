"""The Flax NNX backend (twin: mlx_impl)."""

import jax

from common.prepare import cache_root

# A shape is compiled once on a machine, not once in every command.
jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
