"""LoRA adapters on the trained denoiser (Hu et al. 2021): another style of the same concepts, in a few hundred kB."""

import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from models.train import autoencoder
from models.train.checkpoint import Checkpoint
from models.train.denoiser import build_scheduler, tokenise, velocity_loss
from models.train.export import assemble
from models.train.pictures import STYLES, Pool
from models.train.sources import Emoji
from models.train.words import caption

ADAPTERS = STYLES[1:]
RANK = 6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # every projection of every attention
BATCH = 32
RATE = 2e-3


def train(  # noqa: PLR0917  # as the denoiser's, and the style
    work: Path, kept: list[Emoji], pool: Pool, style: str, steps: int, until: int, device: str
) -> float:
    """Train the adapter of `style` to step `until` of `steps`, and write it; the last mean loss."""
    pipe = assemble(work, kept, pool)
    concept, latents = _latents(work, pool, pipe, style)
    torch.manual_seed(0)
    unet = add_adapter(pipe.unet).to(device)
    unet.set_attn_processor(AttnProcessor() if device == "cpu" else AttnProcessor2_0())
    text_encoder = pipe.text_encoder.to(device)
    parameters = torch.nn.ParameterDict({n.replace(".", "/"): p for n, p in unet.named_parameters() if p.requires_grad})
    optimizer = torch.optim.AdamW(parameters.parameters(), RATE, weight_decay=0.0, betas=(0.9, 0.99))
    file = work / f"lora_{style}.pt"
    if file.exists() and file.stat().st_mtime < (work / "denoiser.pt").stat().st_mtime:
        file.unlink()  # an adapter of an earlier base begins anew
    checkpoint = Checkpoint(file, {"lora": parameters}, optimizer)
    checkpoint.load()
    noise, losses = build_scheduler(), []
    began, start = time.monotonic(), checkpoint.step
    while checkpoint.step < until:
        step = checkpoint.step
        torch.manual_seed(step)
        rng = random.Random(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 30) * max(0.01, 1 - step / steps)
        rows = [rng.randrange(len(latents)) for _ in range(BATCH)]
        tokens = tokenise(pipe.tokenizer, [caption(kept[concept[r]], None, rng) for r in rows]).to(device)
        with torch.no_grad():
            text = text_encoder(tokens)[0]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = velocity_loss(unet, latents[rows].to(device), text, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.parameters(), 1.0)
        optimizer.step()
        checkpoint.step += 1
        checkpoint.average(0.99)
        losses.append(loss.item())
        if checkpoint.step % 25 == 0:
            speed = (time.monotonic() - began) / (checkpoint.step - start)
            print(f"lora {style} {checkpoint.step} loss {np.mean(losses[-25:]):.4f} {speed:.2f} s/step", flush=True)
        if checkpoint.step % 100 == 0 or checkpoint.step == until:
            checkpoint.save()
    checkpoint.load_averages()
    save(unet, work / "loras", style)
    return float(np.mean(losses[-25:])) if losses else float("nan")


def add_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network, frozen, with a new adapter that is trained instead."""
    unet.requires_grad_(requires_grad=False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    return unet


def save(unet: UNet2DConditionModel, folder: Path, style: str) -> None:
    """Write the adapter's weights in fp16 as `load_lora_weights` reads them."""
    layers = {k: v.half() for k, v in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=f"{style}.safetensors")


def _latents(work: Path, pool: Pool, pipe: StableDiffusionPipeline, style: str) -> tuple[list[int], torch.Tensor]:
    rows = np.flatnonzero(pool.style == STYLES.index(style))
    file = work / f"latents_{style}.pt"
    if not file.exists():
        torch.save(autoencoder.encode(pipe.vae, pool.images[rows]), file)
    return pool.concept[rows].tolist(), torch.load(file, weights_only=True)
