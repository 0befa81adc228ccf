"""Grids of experiments: cells run once each, then tables and plots of all of them."""
