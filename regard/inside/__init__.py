"""One page of what a model does inside with one picture and prompt: `regard show`."""

from .drawn import show_drawn
from .lvlm import show

__all__ = ["show", "show_drawn"]
