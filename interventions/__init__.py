"""Published methods, one paper a file."""

from .divergence import Divergence, divergence
from .none import Null
from .recipes import Recipe, apply, recipe, recipes, unwrap, wrap
from .sinks import SinkDimensions, sink_dimensions
from .var import VAR
from .vhr import VHR

__all__ = [
    "VAR",
    "VHR",
    "Divergence",
    "Null",
    "Recipe",
    "SinkDimensions",
    "apply",
    "divergence",
    "recipe",
    "recipes",
    "sink_dimensions",
    "unwrap",
    "wrap",
]
