"""The denoiser and the text encoder, trained together on the latents of the pool (v-prediction, Salimans & Ho 2022).

The text encoder reads more captions than there are pictures in a step: a linear reader must tell from its last tokens
which concept a caption asks for. Rare words cost a picture each otherwise. The reader is thrown away.
"""

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.train import autoencoder
from models.train.checkpoint import Checkpoint
from models.train.pictures import COLOURS, Pool
from models.train.sources import Emoji
from models.train.words import LENGTH, caption, make_tokenizer, name

BATCH = 64
RATE = 8e-4
COLOURED = 0.2  # share of a batch that is recoloured
SETTLED = 5300  # the step from which on each concept is taught in few poses and less in other colours
POSES = 2  # of 24: poses make two thirds of the latents' variance, more than a small model learns in an hour
LONG = 1000  # steps that are worth the minute which compiling takes: 0.60 s a step on one core, not 0.69
READ = 32  # captions read a step without a picture
READING = 0.1  # weight of that loss
WIDTH = 256  # of the text encoder


def build_unet() -> UNet2DConditionModel:
    """The untrained denoiser: 14.0 M parameters on 8x8 latents of 16 channels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 224),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: two layers over the project's own vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=WIDTH,
        )
    )


def build_reader(concepts: int) -> torch.nn.Linear:
    """What tells a caption's concept from the text encoder's state; of use in training alone."""
    return torch.nn.Linear(WIDTH, concepts)


def build_scheduler() -> DDIMScheduler:
    """The noise schedule: Stable Diffusion's shape, taken so far (beta 0.02) that almost no signal is left at its end.

    Every noise scheduler of diffusers understands these values; a rescaled zero terminal SNR only some do.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # of no effect with trailing timesteps; StableDiffusionPipeline warns of any other value
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


@dataclass(frozen=True, slots=True)
class Latents:
    """The pool as the denoiser sees it: `values` (n, 16, 8, 8), and which rows are as they are or recoloured."""

    values: torch.Tensor
    concept: np.ndarray
    colour: np.ndarray
    plain: np.ndarray
    coloured: np.ndarray


def latents(work: Path, pool: Pool, vae: AutoencoderKL) -> Latents:
    """Encode the pool's pictures of the base style once."""
    rows = np.flatnonzero(pool.style == 0)
    file = work / "latents.pt"
    if not file.exists():
        torch.save(autoencoder.encode(vae, pool.images[rows]).half(), file)
    colour = pool.colour[rows]
    return Latents(
        torch.load(file, weights_only=True),
        pool.concept[rows],
        colour,
        np.flatnonzero(colour < 0),
        np.flatnonzero(colour >= 0),
    )


def in_few_poses(data: Latents) -> Latents:
    """The same with the first POSES pictures of each concept, and the first of each of its colours."""
    concept, colour = data.concept, data.colour
    nth = np.zeros(len(concept), np.intp)
    seen: Counter[tuple[int, int]] = Counter()
    for i, pair in enumerate(zip(concept.tolist(), colour.tolist(), strict=True)):
        nth[i] = seen[pair]
        seen[pair] += 1
    plain, coloured = data.plain, data.coloured
    return replace(data, plain=plain[nth[plain] < POSES], coloured=coloured[nth[coloured] < 1])


def prepare_autoencoder(work: Path, pool: Pool) -> AutoencoderKL:
    """The trained autoencoder with its latents normalised over the pool."""
    vae = autoencoder.load(work)
    file = work / "latent_statistics.pt"
    if not file.exists():
        rows = np.flatnonzero((pool.style == 0) & (pool.colour < 0))[::8]
        sample = autoencoder.encode(vae, pool.images[rows])
        torch.save((sample.mean((0, 2, 3)), sample.std((0, 2, 3))), file)
    autoencoder.normalise(vae, *torch.load(file, weights_only=True))
    return vae


def forget_stale_latents(work: Path) -> None:
    """Remove latents of an earlier state of the autoencoder. Raises ValueError if a denoiser has learnt from them."""
    trained = (work / "autoencoder.pt").stat().st_mtime
    stale = [file for file in work.glob("latent*.pt") if file.stat().st_mtime < trained]
    if stale and (work / "denoiser.pt").exists():
        raise ValueError(f"{work}/autoencoder.pt is newer than the latents of denoiser.pt; remove denoiser.pt to go on")
    for file in stale:
        file.unlink()


def train(  # noqa: PLR0917  # as the autoencoder's, and the concepts
    work: Path, kept: list[Emoji], pool: Pool, steps: int, until: int, device: str
) -> float:
    """Train to step `until` of `steps` (the learning rate falls to zero at `steps`); the last mean loss."""
    data = latents(work, pool, prepare_autoencoder(work, pool))
    few = in_few_poses(data)
    tokenizer = make_tokenizer(kept, work / "tokenizer")
    torch.manual_seed(0)
    modules = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer), "reader": build_reader(len(kept))}
    for module in modules.values():
        module.to(device)
    # On a CPU with AMX the fused attention's backward pass in bf16 is slower than plain matrix products.
    modules["unet"].set_attn_processor(AttnProcessor() if device == "cpu" else AttnProcessor2_0())
    parameters = [p for m in modules.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    checkpoint = Checkpoint(work / "denoiser.pt", modules, optimizer)
    checkpoint.load()
    noise = build_scheduler()
    if device == "cpu" and shutil.which("g++") and until - checkpoint.step > LONG:
        modules["unet"].compile()
    losses: list[float] = []
    began, start = time.monotonic(), checkpoint.step
    while checkpoint.step < until:
        step = checkpoint.step
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 300) * max(0.005, 1 - step / steps)
        taught, share = (few, COLOURED / 2) if step >= SETTLED else (data, COLOURED)
        rng = random.Random(step)
        loss = _loss(modules, taught, kept, tokenizer, share=share, noise=noise, rng=rng, device=device)
        reading = _reading_loss(modules, kept, tokenizer, rng, device)
        optimizer.zero_grad()
        (loss + READING * reading).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        checkpoint.step += 1
        checkpoint.average(0.999)
        losses.append(loss.item())
        if checkpoint.step % 50 == 0:
            speed = (time.monotonic() - began) / (checkpoint.step - start)
            said = f"loss {np.mean(losses[-50:]):.4f} reading {reading.item():.3f} {speed:.2f} s/step"
            print(f"denoiser {checkpoint.step} {said}", flush=True)
        if checkpoint.step % 200 == 0 or checkpoint.step == until:
            checkpoint.save()
    return float(np.mean(losses[-50:])) if losses else float("nan")


def _loss(
    modules: dict[str, torch.nn.Module],
    data: Latents,
    kept: list[Emoji],
    tokenizer: CLIPTokenizer,
    *,
    share: float,
    noise: DDIMScheduler,
    rng: random.Random,
    device: str,
) -> torch.Tensor:
    coloured = int(BATCH * share)
    rows = [int(data.plain[rng.randrange(len(data.plain))]) for _ in range(BATCH - coloured)]
    rows += [int(data.coloured[rng.randrange(len(data.coloured))]) for _ in range(coloured)]
    names = [*COLOURS, None]  # colour -1 is the last: none
    captions = [caption(kept[data.concept[r]], names[data.colour[r]], rng) for r in rows]
    clean = data.values[rows].to(device, torch.float32)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        text = modules["text_encoder"](tokenise(tokenizer, captions).to(device))[0]
        return velocity_loss(modules["unet"], clean, text, noise)


def _reading_loss(
    modules: dict[str, torch.nn.Module], kept: list[Emoji], tokenizer: CLIPTokenizer, rng: random.Random, device: str
) -> torch.Tensor:
    """The cross-entropy of the concepts of READ captions, read from the end-of-text tokens."""
    concepts = [rng.randrange(len(kept)) for _ in range(READ)]
    captions = [caption(kept[c], None, rng) or name(kept[c]) for c in concepts]
    tokens = tokenise(tokenizer, captions).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        hidden = modules["text_encoder"](tokens)[0]
        is_end = (tokens == tokenizer.eos_token_id).unsqueeze(-1)  # padding too: the denoiser sees all of them
        state = (hidden * is_end).sum(1) / is_end.sum(1)
        scores = modules["reader"](state)
    return F.cross_entropy(scores.float(), torch.tensor(concepts, device=device))


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The token numbers of captions as the pipeline pads them, (n, LENGTH)."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def velocity_loss(unet: torch.nn.Module, clean: torch.Tensor, text: torch.Tensor, noise: DDIMScheduler) -> torch.Tensor:
    """The mean squared error of the predicted velocity at random timesteps."""
    count = len(clean)
    # One timestep from each of equally many equal parts: less variance than independent draws.
    timesteps = ((torch.arange(count) + torch.rand(count)) / count * noise.config.num_train_timesteps).long()
    timesteps = timesteps[torch.randperm(count)].to(clean.device)
    drawn = torch.randn_like(clean)
    predicted = unet(noise.add_noise(clean, drawn, timesteps), timesteps, text, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise.get_velocity(clean, drawn, timesteps))
