"""Grids of images, and the pictures that a run leaves in its bucket."""
