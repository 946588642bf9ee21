"""Notebooks as runs: their parameters, identity, execution, sweeps and claims. Imports no torch."""
