"""The Flax NNX backend (twin: mlx_impl)."""
