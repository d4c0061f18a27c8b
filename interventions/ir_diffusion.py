"""IR-Diffusion: subjects of a scene that do not look at each other, and look like their portraits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hooks.denoiser import AttentionSite, Denoiser, Grid
from ..hooks.errors import CannotEdit
from ..hooks.latent_edits import Attend, AttentionCall, LatentEdit, Watch
from ..kernels.isolation import Isolation, chosen_tokens, reference_regions
from .method import LatentMethod
from .places import Observed, check_places, places_at, region_of


@dataclass(frozen=True)
class _IRDiffusion(LatentMethod):
    """What both methods of the paper have in common."""

    paper: ClassVar[str] = (
        "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention"
    )
    arxiv: ClassVar[str] = "2411.19261"
    models: ClassVar[tuple[str, ...]] = ("stable-diffusion-xl",)


@dataclass(frozen=True)
class IsolationAttention(_IRDiffusion):
    """Isolation attention: image tokens of one subject do not see those of another (IR-Diffusion, training-free).

    In every self-attention (of SD 3 and Flux: among the image tokens of the joint attention) a query in the mask of
    subject i does not see keys in the mask of subject j. All other pairs are as they were. Hidden keys are left out,
    not masked: no row is without keys and no matrix of scores is kept.

    Where the masks come from is not the paper's: it has a detector over a first picture. Give `masks`, or `concepts`:
    then the masks are Otsu's threshold on the attention to the words, the mean over the steps so far and all layers,
    and isolation begins at the share `start` of the steps, when there is something to see.

    Args:
        concepts: words or phrases of the prompt, or tuples of token indices; or a list of lists, one a prompt.
        masks: (S, H, W) above 0.5 where subject s will be, or (S, 4) boxes: left, top, right, bottom as shares of the
            width and height. They must not overlap, and serve every picture of the call.
        start: share of the steps before isolation begins; None is 0 with masks and 0.2 with concepts.

    Raises:
        ValueError: both of concepts and masks, or none; masks that are empty, overlap, or have another shape.
    """

    name: ClassVar[str] = "isolation"
    kind: ClassVar[str] = "attention isolation"
    cost: ClassVar[str] = "less than plain attention; with concepts also maps of the text"

    concepts: Sequence[Any] = ()
    masks: Any = None
    start: float | None = None

    def __post_init__(self) -> None:
        if bool(self.concepts) == (self.masks is not None):
            raise ValueError(
                "give isolation either concepts=['cat', 'dog'] or masks=(subjects, height, width)"
            )
        if isinstance(self.concepts, str):
            raise ValueError(f"concepts is {self.concepts!r}: give a list, as in concepts=['cat', 'dog']")
        if self.masks is not None:
            object.__setattr__(self, "masks", check_places(self.masks, "masks", disjoint=True))

    def edits(self, denoiser: Denoiser) -> Sequence[LatentEdit]:
        """One edit of the image's attention to itself, and a watch where the words say where subjects are."""
        share = self.start if self.start is not None else (0.2 if self.concepts else 0.0)
        observed = Observed()

        def attend(call: AttentionCall) -> Tensor | None:
            begin = max(1 if self.concepts else 0, round(share * call.steps))
            if call.step < begin:
                return None
            masks = observed.at(call.grid) if self.concepts else [places_at(self.masks, call.grid)]
            return _isolated(call, region_of(masks).to(call.query.device))

        edit = Attend(attend, lambda site: site.kind != "cross")
        return (edit, Watch(tuple(self.concepts), observed.see)) if self.concepts else (edit,)


def _isolated(call: AttentionCall, subject: Tensor) -> Tensor:
    """The call with (B|1, N) subjects of the image tokens kept from each other; -1 is the background."""
    if call.mask is not None:
        raise CannotEdit(f"{call.site.name} has an attention mask of its own, which isolation would lose")
    count = int(subject.max()) + 2
    region = subject.new_full((len(subject), call.query.shape[2]), count - 1)
    region[:, call.image] = torch.where(subject < 0, count - 1, subject)
    if len(region) > 1:
        region = region.repeat(call.query.shape[0] // len(region), 1)
    allow = torch.eye(count, dtype=torch.bool)
    allow[-1], allow[:, -1] = True, True
    return Isolation(region, region, allow).attend(call.query, call.key, call.value, scale=call.scale)


@dataclass(frozen=True)
class IRDiffusion(_IRDiffusion):
    """IR-Diffusion: isolation, and a joint batch in which a scene looks at portraits of its subjects (training-free).

    Call the pipeline with S portrait prompts, subject by subject, and the scene's prompt last. Portraits are drawn as
    they would be. In the scene:

    - self-attention: subjects are isolated from each other at every layer; from the share `start` of the
      transformer blocks on, a position of subject i also sees the keys of portrait i where its subject is. Each step,
      each position of the target keeps that with probability 1 - `dropout`. The background sees no portrait.
    - reposition: the portrait's subject is scaled from its box to the target's (nearest neighbour).
    - mutual cross-attention: where subject i is, `(1 - mutual_cross) * own + mutual_cross * attention of the
      scene's queries to portrait i's prompt`, the mean where targets of several subjects overlap.

    Conditional and unconditional rows alike. Reference: https://github.com/hehuiguo/DreamStory (no licence; IR mode).
    The differences:

    - keys are chosen instead of masked: no NaN rows, and no (S + 1)N columns of scores. A U-Net's self-attention
      knows no positions, so that moving keys changes how often each occurs and nothing else: scaling both sides to one
      place (the paper's words) and moving the reference only (the release) are the same, as a test shows.
    - the release adds to `chunk` views for isolation and drops what its function returns; here it is one call.
    - masks come from `rehearse`, or from any detector, or are boxes; the release has GroundingDINO and SAM built in,
      with its two thresholds swapped. A cell belongs to a mask that covers half of it; the release
      has Otsu over bilinear.
    - dropout has a generator of its own: a run can be repeated, and the noise stays as it was.
    - a run has no counters: the release's processor must be made anew for each picture.

    Args:
        portraits: (S, H, W) above 0.5 where portrait s shows its subject, or (S, 4) boxes: left, top, right, bottom as
            shares of the width and height.
        scene: the same for the scene. Targets must not overlap.
        isolation: subjects of the scene do not see each other.
        reference: the scene sees the portraits.
        reposition: scale what is seen to the target's box; False takes the portrait's positions as they are.
        mutual_cross: share of the portrait prompts in the cross-attention, 0 to 1; 0 is none.
        dropout: chance of a target position to see no reference at a step, from 0 to below 1.
        start: share of the transformer blocks before the first that sees references (the paper's 36 of 70).
        seed: of the dropout.

    Raises:
        ValueError: masks that are empty, overlap in the scene, differ in number, or have another shape; a share out of
            range.
    """

    name: ClassVar[str] = "ir_diffusion"
    kind: ClassVar[str] = "reference attention"
    cost: ClassVar[str] = (
        "the portraits beside the scene, and their subjects as further keys in half of the layers"
    )

    portraits: Any = None
    scene: Any = None
    isolation: bool = True
    reference: bool = True
    reposition: bool = True
    mutual_cross: float = 0.9
    dropout: float = 0.5
    start: float = 36 / 70
    seed: int = 0

    def __post_init__(self) -> None:
        if self.portraits is None or self.scene is None:
            raise ValueError(
                "ir_diffusion needs portraits= and scene=: masks, boxes, or what regard.rehearse found"
            )
        object.__setattr__(self, "portraits", check_places(self.portraits, "portraits", disjoint=False))
        object.__setattr__(self, "scene", check_places(self.scene, "scene", disjoint=True))
        if len(self.portraits) != len(self.scene):
            raise ValueError(
                f"{len(self.portraits)} portraits, {len(self.scene)} subjects in the scene: give one each"
            )
        for name, most in (("mutual_cross", 1.0), ("dropout", 0.999), ("start", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 to {most:g}")

    def edits(self, denoiser: Denoiser) -> Sequence[LatentEdit]:
        """One edit of the self-attention, and one of the cross-attention.

        Raises:
            CannotEdit: a transformer, whose attention has text and image in one sequence and knows positions.
        """
        if denoiser.family != "unet":
            raise CannotEdit(
                f"ir_diffusion edits the self- and cross-attention of a U-Net, not a {type(denoiser.module).__name__}: "
                "use isolation"
            )
        blocks = [site.name for site in sorted(denoiser.sites, key=_execution) if site.kind == "self"]
        late = frozenset(blocks[round(self.start * len(blocks)) :])
        scene = _Scene(self, late)
        found: list[LatentEdit] = [Attend(scene.attend_image, lambda site: site.kind == "self")]
        if self.mutual_cross:
            found.append(Attend(scene.attend_text, lambda site: site.kind == "cross"))
        return found


def _execution(site: AttentionSite) -> int:
    """Down, middle, up: modules are registered in another order."""
    return ("down", "mid", "up").index(site.name.split("_")[0])


class _Scene:
    """The attention of a scene beside the portraits of its subjects."""

    def __init__(self, method: IRDiffusion, late: frozenset[str]) -> None:
        self.method, self.late, self.count = method, late, len(method.scene)
        self._made: dict[tuple[Grid, bool], tuple[list[Tensor], Isolation]] = {}
        self._step = -1

    def _split(self, call: AttentionCall, tensor: Tensor) -> Tensor:
        """(B, ...) as (guidance, S + 1, pictures a prompt, ...)."""
        images = call.rows.stop - call.rows.start
        if images % (self.count + 1):
            raise CannotEdit(
                f"ir_diffusion has {self.count} subjects and the pipeline draws {images} pictures: call it with "
                f"{self.count + 1} prompts, a portrait of each subject and the scene last"
            )
        return tensor.unflatten(0, (-1, self.count + 1, images // (self.count + 1)))

    def _joined(self, call: AttentionCall, portraits: Tensor, scene: Tensor) -> Tensor:
        """Outputs of the portraits' rows and of the scene's, back in the batch's order."""
        times = (call.rows.stop - call.rows.start) // (self.count + 1)
        parts = portraits.unflatten(0, (-1, self.count, times)), scene.unflatten(0, (-1, 1, times))
        return torch.cat(parts, 1).flatten(0, 2)

    # ---- self-attention -------------------------------------------------------------------------

    def attend_image(self, call: AttentionCall) -> Tensor:
        """Portraits see themselves; the scene sees what its regions allow."""
        if call.mask is not None:
            raise CannotEdit(
                f"{call.site.name} has an attention mask of its own, which ir_diffusion would lose"
            )
        query, key, value = (self._split(call, t) for t in (call.query, call.key, call.value))
        portraits = call.attend(*(t[:, :-1].flatten(0, 2) for t in (query, key, value)))
        own_key, own_value = (t[:, -1].flatten(0, 1) for t in (key, value))
        chosen, regions = self._regions(call, call.site.name in self.late and self.method.reference)
        if chosen:
            own_key, own_value = _seen(key, own_key, chosen), _seen(value, own_value, chosen)
        scene = regions.attend(query[:, -1].flatten(0, 1), own_key, own_value, scale=call.scale)
        return self._joined(call, portraits, scene)

    def _regions(self, call: AttentionCall, reference: bool) -> tuple[list[Tensor], Isolation]:
        """For each subject which keys of its portrait are seen, and the scene's regions; kept for the step."""
        if call.step != self._step:
            self._made.clear()
            self._step = call.step
        if (call.grid, reference) not in self._made:
            method, device = self.method, call.query.device
            targets = places_at(method.scene, call.grid)
            chosen: list[Tensor] = []
            if reference:
                chosen = _reference_cells(places_at(method.portraits, call.grid), targets, method.reposition)
            subjects = torch.arange(len(chosen)).repeat_interleave(
                torch.tensor([*map(len, chosen)], dtype=torch.long)
            )
            kept = (
                _dropped(targets, method.dropout, f"{method.seed}/{call.step}/{call.grid}")
                if reference
                else targets
            )
            flat = (t.flatten(1).to(device) for t in (targets, kept))
            regions = reference_regions(next(flat), subjects.to(device), next(flat), method.isolation)
            self._made[call.grid, reference] = ([few.to(device) for few in chosen], regions)
        return self._made[call.grid, reference]

    # ---- cross-attention ------------------------------------------------------------------------

    def attend_text(self, call: AttentionCall) -> Tensor:
        """Where a subject is, the scene listens to the prompt of its portrait."""
        if call.mask is not None:
            raise CannotEdit(f"{call.site.name} has a mask over the text, which ir_diffusion would lose")
        query, key, value = (self._split(call, t) for t in (call.query, call.key, call.value))
        targets = places_at(self.method.scene, call.grid).flatten(1).to(call.query.device)
        whole = self._split(call, call.attend(call.query, call.key, call.value))
        scene = whole[:, -1].flatten(0, 1)
        others = torch.zeros_like(scene)
        for subject, target in enumerate(targets):
            cells = target.nonzero()[:, 0]
            rows = query[:, -1].flatten(0, 1).index_select(2, cells)
            keys, values = (t[:, subject].flatten(0, 1) for t in (key, value))
            heard = F.scaled_dot_product_attention(rows, keys, values, scale=call.scale)
            others = others.index_add(2, cells, heard)
        times = targets.sum(0)
        share = self.method.mutual_cross * (times > 0).to(scene)[:, None]
        scene = (1 - share) * scene + share * others / times.clamp_min(1).to(scene)[:, None]
        return self._joined(call, whole[:, :-1].flatten(0, 2), scene)


def _seen(references: Tensor, own: Tensor, chosen: list[Tensor]) -> Tensor:
    """Chosen keys (or values) of portraits (G, S + 1, n, H, N, D) before those of the scene (G * n, H, N, D)."""
    portraits = references[:, :-1].transpose(1, 2).flatten(0, 1)
    return torch.cat([chosen_tokens(portraits, chosen), own], 2)


def _reference_cells(portraits: Tensor, targets: Tensor, reposition: bool) -> list[Tensor]:
    """For each subject the positions (n,) of its portrait that are seen, as often as they are seen."""
    width = portraits.shape[2]
    found = []
    for source, target in zip(portraits, targets, strict=True):
        cells = source.flatten().nonzero()[:, 0]
        if reposition:
            rows = [_stretched(source.any(axis), target.any(axis)) for axis in (1, 0)]
            grid = rows[0][:, None] * width + rows[1]
            moved = grid[source.flatten()[grid]]
            # a sparse mask may be lost between the cells of a smaller box
            cells = moved if len(moved) else cells
        found.append(cells)
    return found


def _stretched(source: Tensor, target: Tensor) -> Tensor:
    """For each line of the target's box, the nearest line of the source's, both (n,) bool."""
    (own,), (wanted,) = source.nonzero(as_tuple=True), target.nonzero(as_tuple=True)
    have, need = int(own[-1] - own[0]) + 1, int(wanted[-1] - wanted[0]) + 1
    return own[0] + torch.arange(need) * have // need


def _dropped(targets: Tensor, chance: float, seed: str) -> Tensor:
    """The targets without a random part; one that would be empty stays whole."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(31))
    kept = targets & (torch.rand(targets.shape, generator=generator) >= chance)
    return torch.where(kept.any((1, 2), keepdim=True), kept, targets)
