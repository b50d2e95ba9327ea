"""Pixels --parameters--> nats per image: the observation models (pixels), the bounds on log p(x) (bounds), units."""
