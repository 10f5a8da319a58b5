"""The autoencoder: 64x64 pixels to 8x8 latents of 16 channels and back (diffusers' AutoencoderKL)."""

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from models.train.checkpoint import Checkpoint
from models.train.pictures import Pool

BATCH = 24
RATE = 1.2e-3
KL_WEIGHT = 1e-4
SHARES = (0.62, 0.16, 0.10, 0.12)  # of a batch: as they are, recoloured, flat, night


def build() -> AutoencoderKL:
    """The untrained autoencoder, 3.9 M parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
    )


def train(work: Path, pool: Pool, steps: int, until: int, device: str) -> float:
    """Train to step `until` of `steps` (the learning rate falls to zero at `steps`); the last mean loss."""
    torch.manual_seed(0)
    vae = build().to(device, memory_format=torch.channels_last)
    return _fit(vae, Checkpoint(work / "autoencoder.pt", {"vae": vae}, _optimizer(vae)), pool, steps, until)


def refine(work: Path, pool: Pool, steps: int, until: int, device: str) -> float:
    """Train the decoder on, alone, so that latents stay what they are; the last mean loss."""
    vae = _load_whole(work).to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(requires_grad=False)
    vae.quant_conv.requires_grad_(requires_grad=False)
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    return _fit(vae, Checkpoint(work / "decoder.pt", parts, _optimizer(vae)), pool, steps, until)


def _optimizer(vae: AutoencoderKL) -> torch.optim.Optimizer:
    trained = [p for p in vae.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, RATE, weight_decay=0.0, betas=(0.9, 0.98), fused=True)


def _fit(vae: AutoencoderKL, checkpoint: Checkpoint, pool: Pool, steps: int, until: int) -> float:
    checkpoint.load()
    groups = _groups(pool)
    losses: list[float] = []
    began, start = time.monotonic(), checkpoint.step
    while checkpoint.step < until:
        rng = np.random.default_rng(checkpoint.step)
        torch.manual_seed(checkpoint.step)
        for group in checkpoint.optimizer.param_groups:
            group["lr"] = RATE * min(1, (checkpoint.step + 1) / 200) * max(0.01, 1 - checkpoint.step / steps)
        loss, mse = _loss(vae, batch(pool.images[_draw(groups, rng)], str(vae.device)))
        checkpoint.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        checkpoint.optimizer.step()
        checkpoint.step += 1
        checkpoint.average(0.998)
        losses.append(mse)
        if checkpoint.step % 50 == 0:
            speed = (time.monotonic() - began) / (checkpoint.step - start)
            mean = float(np.mean(losses[-50:]))
            what = checkpoint.file.stem
            print(f"{what} {checkpoint.step} mse {mean:.5f} psnr {psnr(mean):.2f} {speed:.2f} s/step", flush=True)
        if checkpoint.step % 250 == 0 or checkpoint.step == until:
            checkpoint.save()
    return float(np.mean(losses[-50:])) if losses else float("nan")


def load(work: Path) -> AutoencoderKL:
    """The trained autoencoder of `work`, fp32, on the CPU: its running averages, with the decoder as refined so far."""
    vae = _load_whole(work)
    if (work / "decoder.pt").exists():
        averages = torch.load(work / "decoder.pt", weights_only=True)["averages"]
        for part, weights in averages.items():
            getattr(vae, part).load_state_dict(weights)
    return vae.eval()


def _load_whole(work: Path) -> AutoencoderKL:
    vae = build()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["averages"]["vae"])
    return vae


def psnr(mse: float) -> float:
    """Decibels for a mean squared error of values in [-1, 1]."""
    return float(10 * np.log10(4 / mse))


def batch(images: npt.NDArray[np.uint8], device: str) -> torch.Tensor:
    """Pictures (n, 64, 64, 3) as the networks take them: (n, 3, 64, 64), -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(device, torch.float32) / 127.5 - 1


def _loss(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
    error = F.mse_loss(decoded, images)
    edges = F.l1_loss(decoded.diff(dim=3), images.diff(dim=3)) + F.l1_loss(decoded.diff(dim=2), images.diff(dim=2))
    return error + 0.02 * edges + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel(), error.item()


def _groups(pool: Pool) -> list[npt.NDArray[np.intp]]:
    plain, coloured = pool.style == 0, pool.colour >= 0
    masks = (plain & ~coloured, plain & coloured, pool.style == 1, pool.style == 2)
    return [np.flatnonzero(m) for m in masks]


def _draw(groups: list[npt.NDArray[np.intp]], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    which = rng.choice(len(groups), BATCH, p=SHARES)
    return np.array([groups[g][rng.integers(len(groups[g]))] for g in which])


def normalise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a per-channel shift and scale into the 1x1 convolutions, so that latents have mean 0 and deviation 1."""
    channels = mean.numel()
    with torch.no_grad():
        into, out_of = vae.quant_conv, vae.post_quant_conv
        into.weight[:channels] /= std.view(-1, 1, 1, 1)
        into.bias[:channels] = (into.bias[:channels] - mean) / std
        into.bias[channels:] -= 2 * std.log()  # the posterior's log-variance
        out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(1)
        out_of.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """The latents of many pictures (the posterior's means), (n, 16, 8, 8) fp32."""
    parts = [vae.encode(batch(images[i : i + 64], "cpu")).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures through the autoencoder and back, as bytes."""
    latents = encode(vae, images)
    decoded = torch.cat([vae.decode(z).sample for z in latents.split(64)])
    return to_bytes(decoded)


def to_bytes(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Pictures (n, 3, h, w) of -1 to 1 as bytes (n, h, w, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
