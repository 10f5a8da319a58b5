"""Bare: the time of a forward against its rows, of the denoiser and the VAE alone, in this process: the ceiling."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from benchmarks.rivals.painter import SIDE, Painter
from benchmarks.workload import Wish

ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32)
PICTURES = (1, 2, 4, 8)
REPEATS = 5
Curve = dict[int, float]


def curve(forward: Callable[[int], object], sizes: Sequence[int], repeats: int = REPEATS) -> Curve:
    """Seconds of a forward by its rows, each the median of some, measured in turns."""
    times: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(repeats + 1):
        for rows, seen in times.items():
            began = time.perf_counter()
            forward(rows)
            seen.append(time.perf_counter() - began)
    return {rows: median(seen[1:]) for rows, seen in times.items()}  # the very first one loads kernels


def best(measured: Curve) -> float:
    """The most rows a second, at the best batch size."""
    return max(rows / seconds for rows, seconds in measured.items())


@torch.inference_mode()
def measure(painter: Painter, rows: Sequence[int] = ROWS, repeats: int = REPEATS) -> tuple[Curve, Curve]:
    """t(B) of the denoiser by rows, and of the VAE's decode by pictures."""
    unet, vae = painter.pipe.unet, painter.pipe.vae
    side = SIDE // painter.pipe.vae_scale_factor
    text = painter.pipe.text_encoder.config

    def denoise(count: int) -> object:
        sample = torch.randn(count, unet.config.in_channels, side, side)
        states = torch.randn(count, text.max_position_embeddings, text.hidden_size)
        return unet(sample, torch.full((count,), 500.0), states)

    def decode(count: int) -> object:
        return vae.decode(torch.randn(count, vae.config.latent_channels, side, side))

    return curve(denoise, rows, repeats), curve(decode, PICTURES, repeats)


def one_by_one(painter: Painter, wishes: Sequence[Wish]) -> float:
    """Seconds of plain diffusers for them, one request after another."""
    began = time.perf_counter()
    for wish in wishes:
        painter.paint([wish.body])
    return time.perf_counter() - began
