"""Ranking data: formats, sources, training lists and batches."""
