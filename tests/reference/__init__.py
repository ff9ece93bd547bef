"""Slow oracles, written differently from the package, that tests compare it with."""
