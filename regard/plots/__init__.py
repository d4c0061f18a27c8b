"""Pictures of what a model does inside: the central figures of the papers, for any model and image."""
