"""Train the text-to-image miniature from nothing, in three stages that can be stopped and resumed.

    python -m regard.evals.miniature.train_t2i --out runs/t2i
    python -m regard.evals.miniature.train_t2i --out runs/t2i --device cuda --steps-scale 10

vae: an autoencoder of the pictures. unet: the text model and the U-Net learn to denoise its latents.
judge: a classifier of the subjects, on drawn pictures as the autoencoder renders them.
The folder then holds a pipeline that `StableDiffusionPipeline.from_pretrained` reads, and the folder `judge`.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from .categories import NAMES
from .subjects import SUBJECTS, draw_picture, training_example
from .text_to_image import build_judge, build_pipeline, build_vae, judge_labels

STEPS = {"vae": 1200, "unet": 5600, "judge": 1200}
BATCH = 32
_POOL = 40_000
_RATE = {"vae": 2e-3, "unet": 1e-3, "judge": 2e-3}


def to_tensor(pictures: np.ndarray, device: str) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


class Loop:
    """Steps of one stage with a cosine rate; saves every two minutes and takes up where it was killed."""

    def __init__(self, stage: str, model: torch.nn.Module, options: argparse.Namespace) -> None:
        self.stage, self.model, self.options = stage, model, options
        self.steps = round(STEPS[stage] * options.steps_scale)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE[stage], weight_decay=0.01)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.file = options.out / f"{stage}.pt"

    def save(self, step: int) -> None:
        """Write model, average and optimiser, in one move."""
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "step": step}
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def resume(self) -> int:
        """The step to go on from."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, map_location=self.options.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def run(self, loss_of: Callable[[int], torch.Tensor]) -> torch.nn.Module:
        """Train to the end and return the averaged model."""
        first, meter = self.resume(), 0.0
        begun = saved = time.time()
        for step in range(first, self.steps):
            progress = step / self.steps
            rate = _RATE[self.stage] * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in self.optimizer.param_groups:
                group["lr"] = rate + 1e-5
            loss = loss_of(step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            decay = min(0.998, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
                for kept, now in zip(self.average.buffers(), self.model.buffers(), strict=True):
                    kept.copy_(now)
            meter = 0.98 * meter + 0.02 * loss.item() if meter else loss.item()
            if (step + 1) % 50 == 0:
                speed = (step + 1 - first) * BATCH / (time.time() - begun)
                print(f"{self.stage} {step + 1}/{self.steps} loss {meter:.5f} {speed:.0f} img/s", flush=True)
            if time.time() - saved > 120 or step + 1 == self.steps:
                self.save(step + 1)
                saved = time.time()
        return self.average.eval()


def train_vae(pool: np.ndarray, options: argparse.Namespace) -> Any:
    """The autoencoder: absolute and squared error and a slight pull to the normal distribution."""
    vae = build_vae().to(options.device)
    loop = Loop("vae", vae, options)

    def loss_of(step: int) -> torch.Tensor:
        rows = np.random.default_rng([1, step]).integers(0, len(pool), BATCH)
        images = to_tensor(pool[rows], options.device)
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16):
            latent = vae.encode(images).latent_dist
            decoded = vae.decode(latent.sample()).sample
        error = decoded.float() - images
        kl = latent.kl().mean() / (64 * 64 * 3)
        return error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl

    trained = cast(Any, loop.run(loss_of))
    with torch.no_grad():
        images = to_tensor(pool[:512], options.device)
        latents = torch.cat([trained.encode(part).latent_dist.mean for part in images.split(64)])
        decoded = torch.cat([trained.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3))).mean()
    trained.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"vae: {psnr:.1f} dB, scaling factor {trained.config.scaling_factor}", flush=True)
    return trained.requires_grad_(False)


@torch.no_grad()
def encode(vae: Any, pool: np.ndarray, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (N, 8, 16, 16) of the scaled latents of all pictures."""
    found = [
        vae.encode(to_tensor(part, device)).latent_dist for part in np.array_split(pool, len(pool) // 100)
    ]
    scale = vae.config.scaling_factor
    return torch.cat([part.mean for part in found]) * scale, torch.cat([part.std for part in found]) * scale


def train_unet(vae: Any, pool: np.ndarray, captions: list[str], options: argparse.Namespace) -> Any:
    """Text model and U-Net: v-prediction with min-SNR weights, one caption in ten left out."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    pipe = build_pipeline(vae)
    model = torch.nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder}).to(options.device)
    pipe.unet.set_attn_processor(
        AttnProcessor()
    )  # in bf16 the CPU's flash attention is slow to differentiate
    loop = Loop("unet", model, options)
    latents = encode(vae, pool, options.device)
    tokens = pipe.tokenizer(
        [*captions, ""], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    alphas = pipe.scheduler.alphas_cumprod.to(options.device)

    def loss_of(step: int) -> torch.Tensor:
        draw = np.random.default_rng([2, step])
        rows = draw.integers(0, len(pool), BATCH)
        words = torch.from_numpy(np.where(draw.random(BATCH) < 0.1, len(captions), rows))
        random_state = torch.Generator().manual_seed(step)
        noise = torch.randn(2, BATCH, *latents[0].shape[1:], generator=random_state).to(options.device)
        clean = latents[0][rows] + latents[1][rows] * noise[0]
        times = torch.randint(0, 1000, (BATCH,), generator=random_state).to(options.device)
        alpha = alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise[1]
        target = alpha.sqrt() * noise[1] - (1 - alpha).sqrt() * clean
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16):
            text = model["text"](tokens[words].to(options.device)).last_hidden_state
            predicted = model["unet"](noisy, times, text).sample
        error = (predicted.float() - target).square().mean((1, 2, 3))
        signal = alphas[times] / (1 - alphas[times])
        return (error * signal.clamp(max=5) / (signal + 1)).mean() * 2

    trained = cast(Any, loop.run(loss_of))
    pipe.unet.load_state_dict(trained["unet"].state_dict())
    pipe.text_encoder.load_state_dict(trained["text"].state_dict())
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    return pipe


def judge_example(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of none to three subjects, sometimes with other objects, and its labels."""
    rng = random.Random(f"judge/{seed}")
    names = rng.sample(SUBJECTS, rng.choice((0, 1, 1, 2, 2, 3)))
    others = rng.choices([name for name in NAMES if name not in SUBJECTS], k=rng.choice((0, 0, 1)))
    drawn = draw_picture(names, rng, distractors=others or (() if names else ["kite"]))
    labels = judge_labels()
    told = np.zeros(len(labels), np.float32)
    for name, colour in drawn.drawn:
        told[[labels.index(name), labels.index(f"{colour} {name}")]] = 1
    return np.asarray(drawn.image), told


def train_judge(vae: Any, options: argparse.Namespace) -> Any:
    """The judge, on pictures half of which went through the autoencoder."""
    judge = build_judge().to(options.device).train()
    loop = Loop("judge", judge, options)

    def loss_of(step: int) -> torch.Tensor:
        pictures, told = zip(*(judge_example(step * BATCH + row) for row in range(BATCH)), strict=True)
        images = to_tensor(np.stack(pictures), options.device)
        half = BATCH // 2
        with torch.no_grad():
            latent = vae.encode(images[:half]).latent_dist.sample()
            images[:half] = vae.decode(latent + 0.1 * latent.std() * torch.randn_like(latent)).sample.clamp(
                -1, 1
            )
        logits = judge(images).logits
        return functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(np.stack(told)).to(logits)
        )

    return loop.run(loss_of)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pipeline and the training state"
    )
    parser.add_argument("--stage", choices=["vae", "unet", "judge"], help="stop after this stage")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on every stage's steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures, captions = zip(*(training_example(seed) for seed in range(_POOL)), strict=True)
    pool = np.stack(pictures)
    vae = train_vae(pool, options)
    if options.stage == "vae":
        return
    pipe = train_unet(vae, pool, list(captions), options)
    pipe.save_pretrained(options.out)
    if options.stage != "unet":
        train_judge(vae, options).save_pretrained(options.out / "judge")
    print("done", flush=True)


if __name__ == "__main__":
    main()
