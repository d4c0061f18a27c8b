"""Train the miniature LVLM from nothing, in three stages that can be stopped and resumed.

    python -m regard.evals.miniature.train_lvlm --out runs/lvlm --compile
    python -m regard.evals.miniature.train_lvlm --out runs/lvlm --device cuda --bf16 --compile --batch 256 --workers 14

tower: the CLIP tower learns which category covers each patch. ground: many short questions per image, and an
alignment loss that draws a patch's projected feature to its category's word. talk: the wording used later on
harder scenes, and the sink loss of `sinks.py`. The folder then holds a model that `from_pretrained` reads.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from .batches import STAGES, Batches, Stage, Words, block_mask
from .categories import NAMES
from .model import build_model, build_processor, save
from .sinks import sink_loss, sink_tokens


class Trainer:
    """Model, heads that only training needs, and the losses."""

    def __init__(self, device: str, hidden: int, layers: int, bf16: bool) -> None:
        self.processor = build_processor()
        self.words = Words(self.processor.tokenizer)
        self.device, self.bf16 = device, bf16
        model = cast(Any, build_model(self.processor.tokenizer, hidden, layers))
        self.model = model.to(device)
        width = self.model.config.vision_config.hidden_size
        self.heads = nn.ModuleDict(
            {"patch": nn.Linear(width, len(NAMES) + 1), "cls": nn.Linear(width, len(NAMES))}
        ).to(device)
        images = self.processor.image_processor
        self.mean = torch.tensor(images.image_mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(images.image_std, device=device).view(1, 3, 1, 1)
        ids = [self.words(name) for name in NAMES]
        self.name_ids = torch.tensor([[pair[0], pair[-1]] for pair in ids], device=device)

    def pixels(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, 64, 64, 3) uint8 to the image processor's (B, 3, 64, 64)."""
        return (batch["pixels"].permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def tower_loss(
        self, patches: torch.Tensor, pooled: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Category of each patch (B, 64, C), background at 0.3, plus presence from the CLS token (B, C)."""
        weight = torch.ones(len(NAMES) + 1, device=self.device)
        weight[-1] = 0.3
        logits = self.heads["patch"](patches).float()
        dense = functional.cross_entropy(logits.flatten(0, 1), batch["patches"].flatten(), weight)
        presence = self.heads["cls"](pooled).float()
        return dense + functional.binary_cross_entropy_with_logits(presence, batch["present"])

    def align_loss(self, features: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Foreground patches (B, 64, C) predict their category's word embedding by cosine."""
        table = self.model.get_input_embeddings().weight[self.name_ids].mean(1)
        foreground = batch["patches"] < len(NAMES)
        chosen = functional.normalize(features[foreground].float(), dim=-1)
        logits = 16 * chosen @ functional.normalize(table, dim=-1).T
        return functional.cross_entropy(logits, batch["patches"][foreground])

    def losses(self, batch: dict[str, torch.Tensor], stage: Stage) -> dict[str, torch.Tensor]:
        """The stage's loss terms, weighted; their sum is minimised."""
        with torch.set_grad_enabled(stage.tower_lr > 0):
            vision = self.model.model.vision_tower(self.pixels(batch), output_hidden_states=True)
        patches = vision.hidden_states[-2][:, 1:]
        if not stage.caption:
            return {"tower": self.tower_loss(patches, vision.pooler_output, batch)}
        features = self.model.model.multi_modal_projector(patches)
        embeddings = self.model.get_input_embeddings()(batch["ids"])
        where = (batch["ids"] == self.words.image).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, features.to(embeddings.dtype))
        decoded = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=block_mask(batch["blocks"]),
            position_ids=batch["positions"],
            use_cache=False,
            output_hidden_states=stage.sinks > 0,
        )
        hidden = decoded.last_hidden_state
        terms = {"align": stage.align * self.align_loss(features, batch)}
        if stage.sinks:
            marked = sink_tokens(batch["ids"], self.words.image, batch["patches"] == len(NAMES))
            terms["sinks"] = stage.sinks * sink_loss(decoded.hidden_states[:-1], marked)
        if stage.tower_lr:
            terms["tower"] = 0.1 * self.tower_loss(patches, vision.pooler_output, batch)
        targets, kinds = batch["labels"][:, 1:], batch["kinds"][:, 1:]
        for name, kind in (("answer", 1), ("caption", 2)):
            chosen = kinds == kind
            logits = self.model.lm_head(hidden[:, :-1][chosen]).float()
            terms[name] = functional.cross_entropy(logits, targets[chosen])
        return terms

    def optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        """AdamW without decay; the tower has its own rate."""
        tower = list(self.model.model.vision_tower.parameters()) + list(self.heads.parameters())
        known = {id(parameter) for parameter in tower}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        groups = [{"params": tower, "peak": stage.tower_lr}, {"params": rest, "peak": stage.lr}]
        return torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0)


def write(folder: Path, trainer: Trainer, optimizer: Any, place: dict[str, Any]) -> None:
    """Save the model, then the training state, so that a killed run resumes from here."""
    save(trainer.model, trainer.processor, folder)
    state = {"heads": trainer.heads.state_dict(), "optimizer": optimizer.state_dict(), "place": place}
    torch.save(state, folder / "training.tmp")
    (folder / "training.tmp").replace(folder / "training.pt")


def resume(folder: Path, trainer: Trainer) -> dict[str, Any] | None:
    """Load the last saved state; None where there is none."""
    if not (folder / "training.pt").exists():
        return None
    from transformers import LlavaForConditionalGeneration

    saved = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    trainer.model.load_state_dict(saved.state_dict())
    state = torch.load(folder / "training.pt", map_location=trainer.device, weights_only=True)
    trainer.heads.load_state_dict(state["heads"])
    return state


def run_stage(
    trainer: Trainer, stage: Stage, folder: Path, state: dict[str, Any] | None, options: argparse.Namespace
) -> bool:
    """Train one stage, from the saved place if it lies in this stage. False when the time is up."""
    steps = stage.images // stage.batch
    first = state["place"]["step"] if state and state["place"]["stage"] == stage.name else 0
    spent = state["place"]["seconds"] if state else 0.0
    optimizer = trainer.optimizer(stage)
    if state and first:
        optimizer.load_state_dict(state["optimizer"])
    data = Batches(stage, trainer.words, first, steps, options.seed)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=options.workers, prefetch_factor=4 if options.workers else None
    )
    begun, saved = time.time(), time.time()
    meter: dict[str, float] = {}
    for step, raw in enumerate(loader, start=first):
        batch = {name: value.to(trainer.device) for name, value in raw.items()}
        ramp = min(1.0, (step + 1) / options.warmup)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps)) * 0.97 + 0.03
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * ramp * decay
        with torch.autocast(trainer.device.split(":")[0], torch.bfloat16, enabled=trainer.bf16):
            terms = trainer.losses(batch, stage)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        for name, value in terms.items():
            meter[name] = 0.95 * meter.get(name, value.item()) + 0.05 * value.item()
        seconds = spent + time.time() - begun
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) * stage.batch / (time.time() - begun)
            line = " ".join(f"{name} {value:.4f}" for name, value in meter.items())
            print(f"{stage.name} {step + 1}/{steps} {rate:.0f} img/s {line} {seconds:.0f} s", flush=True)
        place = {"stage": stage.name, "step": step + 1, "seconds": seconds}
        out_of_time = options.minutes and time.time() - options.begun > 60 * options.minutes
        if time.time() - saved > 120 or step + 1 == steps or out_of_time:
            write(folder, trainer, optimizer, place)
            saved = time.time()
        if out_of_time:
            return False
    return True


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the training state")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help="only this stage")
    parser.add_argument("--images", type=int, help="images per stage instead of each stage's own")
    parser.add_argument("--batch", type=int, help="batch size instead of each stage's own (a GPU: 256)")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="factor on every learning rate")
    parser.add_argument("--hidden", type=int, default=128, help="decoder width")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast (for GPUs)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the decoder layers (needs a C++ compiler)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--minutes", type=float, default=0, help="stop and save after this long (0: never)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    options = arguments(argv)
    options.begun = time.time()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.device, options.hidden, options.layers, options.bf16)
    state = resume(options.out, trainer)
    if options.compile:
        trainer.model.model.language_model.compile(dynamic=False)
    names = [stage.name for stage in STAGES]
    start = names.index(state["place"]["stage"]) if state else 0
    for number, stage in enumerate(STAGES):
        if number < start or (options.stage and stage.name != options.stage):
            continue
        changed = dataclasses.replace(
            stage,
            images=options.images or stage.images,
            batch=options.batch or stage.batch,
            lr=stage.lr * options.lr_scale,
            tower_lr=stage.tower_lr * options.lr_scale,
        )
        print(json.dumps(dataclasses.asdict(changed)), flush=True)
        if not run_stage(trainer, changed, options.out, state, options):
            return
        state = torch.load(options.out / "training.pt", weights_only=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
