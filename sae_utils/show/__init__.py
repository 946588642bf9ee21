"""Figures and highlighted text."""
