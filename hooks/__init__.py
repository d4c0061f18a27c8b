"""The engine: attach edits to a model and take them off again."""
