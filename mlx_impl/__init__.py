"""The MLX backend (twin: jax_impl)."""
