"""Sparse encoding and decoding with hand-written backward passes."""
