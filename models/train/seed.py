"""Seed: the published weights as checkpoints, so that a training can go on where the released one ended."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from models.train.checkpoint import Checkpoint
from models.train.denoiser import RATE, build_reader


def seed(published: Path, work: Path, step: int) -> None:
    """Write autoencoder.pt, denoiser.pt (at `step`, its optimiser fresh) and the tokenizer from a published folder.

    Raises FileExistsError where the work folder holds a training already.
    """
    for file in ("autoencoder.pt", "denoiser.pt"):
        if (work / file).exists():
            raise FileExistsError(f"{work / file} is there: go on with it, or name another --work")
    vae = AutoencoderKL.from_pretrained(published / "vae").float()
    _write(work / "autoencoder.pt", {"vae": vae}, step=0)
    shutil.copytree(published / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    unet = UNet2DConditionModel.from_pretrained(published / "unet").float()
    text_encoder = CLIPTextModel.from_pretrained(published / "text_encoder").float()
    reader = build_reader(len((published / "names.tsv").read_text(encoding="utf-8").splitlines()))
    _write(work / "denoiser.pt", {"unet": unet, "text_encoder": text_encoder, "reader": reader}, step=step)


def _write(file: Path, modules: dict[str, torch.nn.Module], step: int) -> None:
    parameters = [p for m in modules.values() for p in m.parameters()]
    checkpoint = Checkpoint(file, modules, torch.optim.AdamW(parameters, RATE, weight_decay=0.01, betas=(0.9, 0.99)))
    checkpoint.step = step
    checkpoint.save()
