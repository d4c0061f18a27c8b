"""Pictures of what a model does inside: the central figures of the papers, for any model and image.

Each function takes what `regard.divergence`, `regard.attention` and the like give and returns a matplotlib figure. With
`ax=` it draws on that axis instead; functions of several panels divide it. Nothing is shown or saved, and pyplot is not
used: the figure shows itself in a notebook, and `figure.savefig("name.pdf")` prints it.
"""

from .attended import attention, flow, masses, sinks
from .divergences import t_vhd, vhd
from .generated import masks, word_maps
from .towers import distance, importance, outliers, patterns

__all__ = [
    "attention",
    "distance",
    "flow",
    "importance",
    "masks",
    "masses",
    "outliers",
    "patterns",
    "sinks",
    "t_vhd",
    "vhd",
    "word_maps",
]
