"""The definition, in float64 NumPy, that both backends are held to."""
