"""Export: the trained parts as one folder that StableDiffusionPipeline.from_pretrained loads as it is."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from diffusers import StableDiffusionPipeline

from models.train import card
from models.train.denoiser import build_scheduler, build_text_encoder, build_unet, prepare_autoencoder
from models.train.pictures import Pool
from models.train.sources import Emoji
from models.train.words import make_tokenizer, name

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "loras")
SHARD = "15MB"  # of 10^6 bytes: no file over 15 MiB, which code hosts and their mirrors take without ado


def export(work: Path, kept: list[Emoji], pool: Pool, target: Path) -> int:
    """Write the running averages in fp16, the adapters, the names and the card to `target`; the weights' bytes."""
    transformers.utils.logging.disable_progress_bar()
    pipe = assemble(work, kept, pool)
    for part in PARTS:
        shutil.rmtree(target / part, ignore_errors=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(target, safe_serialization=True, max_shard_size=SHARD)
    _load_in_fp32(target / "text_encoder" / "config.json")
    for file in ("vocab.json", "merges.txt"):  # what releases of transformers before 5 read instead of tokenizer.json
        shutil.copy(work / "tokenizer" / file, target / "tokenizer" / file)
    for adapter in sorted((work / "loras").glob("*.safetensors")):
        (target / "loras").mkdir(exist_ok=True)
        shutil.copy(adapter, target / "loras" / adapter.name)
    (target / "names.tsv").write_text("".join(f"{name(e)}\t{e.code}\n" for e in kept), encoding="utf-8")
    (target / "evaluation.json").unlink(missing_ok=True)  # the figures of other weights
    card.write(target)
    for file in target.rglob("*"):  # safetensors are written readable by their owner alone
        file.chmod(0o755 if file.is_dir() else 0o644)
    return sum(f.stat().st_size for f in target.rglob("*.safetensors"))


def _load_in_fp32(config: Path) -> None:
    # transformers 5 loads in the dtype that the file names, diffusers in fp32: loaded with no dtype the two would mix.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def assemble(work: Path, kept: list[Emoji], pool: Pool) -> StableDiffusionPipeline:
    """The pipeline of the latest checkpoints' running averages, in fp32."""
    averages = torch.load(work / "denoiser.pt", weights_only=True, mmap=True)["averages"]
    tokenizer = make_tokenizer(kept, work / "tokenizer")
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    unet.load_state_dict(averages["unet"])
    text_encoder.load_state_dict(averages["text_encoder"])
    return StableDiffusionPipeline(
        vae=prepare_autoencoder(work, pool),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
