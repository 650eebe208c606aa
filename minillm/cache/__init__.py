"""Caches for keys and values: in a row, or in blocks."""
