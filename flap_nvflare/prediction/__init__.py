"""Masks of scans that nobody has drawn, from a trained adapter."""
