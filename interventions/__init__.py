"""Published methods, one paper a file."""

from .agla import AGLA
from .astar import ASTAR
from .attencraft import WordMasks, word_masks
from .attend_excite import AttendExcite
from .attention import Attention, attention
from .daam import WordHeat, word_heat
from .damro import DAMRO
from .divergence import Divergence, divergence
from .dola import DoLa
from .dyvte import DyVTE
from .icd import ICD
from .ir_diffusion import IRDiffusion, IsolationAttention
from .m3id import M3ID
from .matching import AttentionMatcher, BlipMatcher
from .mma import MMA
from .none import Null
from .opera import OPERA
from .pai import PAI
from .paint import PAINT
from .plausible import Plausible
from .recipes import Recipe, apply, recipe, recipes, unwrap, wrap
from .rehearsal import Rehearsal, rehearse
from .sink_removal import DropSinks
from .sinks import SinkDimensions, sink_dimensions
from .tower_heads import TowerHeads, tower_heads, without_heads
from .tower_outliers import ClsOutliers, cls_outliers
from .tower_patterns import HeadClusters
from .var import VAR
from .vcd import VCD
from .vhr import VHR
from .vlsam import ObjectMap, ObjectMaps, object_maps

__all__ = [
    "AGLA",
    "ASTAR",
    "DAMRO",
    "ICD",
    "M3ID",
    "MMA",
    "OPERA",
    "PAI",
    "PAINT",
    "VAR",
    "VCD",
    "VHR",
    "AttendExcite",
    "Attention",
    "AttentionMatcher",
    "BlipMatcher",
    "ClsOutliers",
    "Divergence",
    "DoLa",
    "DropSinks",
    "DyVTE",
    "HeadClusters",
    "IRDiffusion",
    "IsolationAttention",
    "Null",
    "ObjectMap",
    "ObjectMaps",
    "Plausible",
    "Recipe",
    "Rehearsal",
    "SinkDimensions",
    "TowerHeads",
    "WordHeat",
    "WordMasks",
    "apply",
    "attention",
    "cls_outliers",
    "divergence",
    "object_maps",
    "recipe",
    "recipes",
    "rehearse",
    "sink_dimensions",
    "tower_heads",
    "unwrap",
    "without_heads",
    "word_heat",
    "word_masks",
    "wrap",
]
