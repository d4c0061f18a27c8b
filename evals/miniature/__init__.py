"""Procedural scenes and the small models trained on them."""
