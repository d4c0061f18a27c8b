"""regard: training-free interventions on multimodal models, each figure beside its baseline."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

_root = _Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():  # a source checkout: the subpackages lie beside this folder
    __path__.append(str(_root))

__version__ = "0.1.0"

_HOMES = {  # public name -> where it lives; imported at first use, so that `import regard` is quick
    "apply": "interventions",
    "wrap": "interventions",
    "unwrap": "interventions",
    "recipe": "interventions",
    "recipes": "interventions",
    "divergence": "interventions",
    "attention": "interventions",
    "cls_outliers": "interventions",
    "tower_heads": "interventions",
    "without_heads": "interventions",
    "word_masks": "interventions",
    "show": "inside",
    "show_drawn": "inside",
    "object_maps": "interventions",
    "sink_dimensions": "interventions",
    "ASTAR": "interventions",
    "AttendExcite": "interventions",
    "Attend": "hooks.latent_edits",
    "Guidance": "hooks.latent_edits",
    "Watch": "hooks.latent_edits",
    "PipelineRun": "hooks.pipeline_run",
    "word_heat": "interventions",
    "rehearse": "interventions",
    "IRDiffusion": "interventions",
    "IsolationAttention": "interventions",
    "VHR": "interventions",
    "VAR": "interventions",
    "DoLa": "interventions",
    "DyVTE": "interventions",
    "DAMRO": "interventions",
    "ICD": "interventions",
    "PAINT": "interventions",
    "Plausible": "interventions",
    "VCD": "interventions",
    "M3ID": "interventions",
    "PAI": "interventions",
    "DropSinks": "interventions",
    "OPERA": "interventions",
    "AGLA": "interventions",
    "AttentionMatcher": "interventions",
    "BlipMatcher": "interventions",
    "MMA": "interventions",
    "Null": "interventions",
    "Bias": "hooks.edits",
    "MassPolicy": "hooks.edits",
    "HeadGain": "hooks.edits",
    "Hidden": "hooks.edits",
    "Branch": "hooks.edits",
    "Mask": "hooks.edits",
    "Tower": "hooks.edits",
    "Exit": "hooks.edits",
    "Logits": "hooks.edits",
    "Decoding": "hooks.edits",
    "Groups": "kernels.groups",
    "reweighted_attention": "kernels.reweighted",
    "merge_partials": "kernels.partial",
    "concept_maps": "kernels.maps",
    "attention_flow": "kernels.maps",
    "isolated_attention": "kernels.isolation",
    "Run": "hooks.run",
    "doctor": "hooks.doctor",
    "RegardError": "hooks.errors",
    "CannotEdit": "hooks.errors",
    "NoImageTokens": "hooks.errors",
    "NoObjectWords": "hooks.errors",
    "OutOfRange": "hooks.errors",
    "UnknownName": "hooks.errors",
    "load_miniature": "evals.miniature",
    "evaluate": "evals.runner",
    "Results": "evals.results",
    "import_answers": "evals.harnesses.importer",
}
_MODULES = ("plots",)
__all__ = ["__version__", *_MODULES, *sorted(_HOMES)]

if TYPE_CHECKING:
    from . import plots as plots
    from .evals.harnesses.importer import import_answers as import_answers
    from .evals.miniature import load_miniature as load_miniature
    from .evals.results import Results as Results
    from .evals.runner import evaluate as evaluate
    from .hooks.doctor import doctor as doctor
    from .hooks.edits import Bias as Bias
    from .hooks.edits import Branch as Branch
    from .hooks.edits import Decoding as Decoding
    from .hooks.edits import Exit as Exit
    from .hooks.edits import HeadGain as HeadGain
    from .hooks.edits import Hidden as Hidden
    from .hooks.edits import Logits as Logits
    from .hooks.edits import Mask as Mask
    from .hooks.edits import MassPolicy as MassPolicy
    from .hooks.edits import Tower as Tower
    from .hooks.errors import CannotEdit as CannotEdit
    from .hooks.errors import NoImageTokens as NoImageTokens
    from .hooks.errors import NoObjectWords as NoObjectWords
    from .hooks.errors import OutOfRange as OutOfRange
    from .hooks.errors import RegardError as RegardError
    from .hooks.errors import UnknownName as UnknownName
    from .hooks.latent_edits import Attend as Attend
    from .hooks.latent_edits import Guidance as Guidance
    from .hooks.latent_edits import Watch as Watch
    from .hooks.pipeline_run import PipelineRun as PipelineRun
    from .hooks.run import Run as Run
    from .inside import show as show
    from .inside import show_drawn as show_drawn
    from .interventions import AGLA as AGLA
    from .interventions import ASTAR as ASTAR
    from .interventions import DAMRO as DAMRO
    from .interventions import ICD as ICD
    from .interventions import M3ID as M3ID
    from .interventions import MMA as MMA
    from .interventions import OPERA as OPERA
    from .interventions import PAI as PAI
    from .interventions import PAINT as PAINT
    from .interventions import VAR as VAR
    from .interventions import VCD as VCD
    from .interventions import VHR as VHR
    from .interventions import AttendExcite as AttendExcite
    from .interventions import AttentionMatcher as AttentionMatcher
    from .interventions import BlipMatcher as BlipMatcher
    from .interventions import DoLa as DoLa
    from .interventions import DropSinks as DropSinks
    from .interventions import DyVTE as DyVTE
    from .interventions import IRDiffusion as IRDiffusion
    from .interventions import IsolationAttention as IsolationAttention
    from .interventions import Null as Null
    from .interventions import Plausible as Plausible
    from .interventions import apply as apply
    from .interventions import attention as attention
    from .interventions import cls_outliers as cls_outliers
    from .interventions import divergence as divergence
    from .interventions import object_maps as object_maps
    from .interventions import recipe as recipe
    from .interventions import recipes as recipes
    from .interventions import rehearse as rehearse
    from .interventions import sink_dimensions as sink_dimensions
    from .interventions import tower_heads as tower_heads
    from .interventions import unwrap as unwrap
    from .interventions import without_heads as without_heads
    from .interventions import word_heat as word_heat
    from .interventions import word_masks as word_masks
    from .interventions import wrap as wrap
    from .kernels.groups import Groups as Groups
    from .kernels.isolation import isolated_attention as isolated_attention
    from .kernels.maps import attention_flow as attention_flow
    from .kernels.maps import concept_maps as concept_maps
    from .kernels.partial import merge_partials as merge_partials
    from .kernels.reweighted import reweighted_attention as reweighted_attention


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return _import_module(f"regard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    value = getattr(_import_module(f"regard.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
