"""Tiny model: a complete Stable Diffusion pipeline with tiny random weights, the same bytes everywhere.

It paints coloured noise, at 64 x 64 pixels on 8 x 8 latents, in milliseconds a step: for trying out everything but
the pictures. `python -m worker.pipelines.tiny_model FOLDER` writes it.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SEED = 20
START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH = 32  # of the text embedding


def write_tiny(folder: Path) -> None:
    """Write the pipeline's diffusers folder: model_index.json, safetensors, tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    build().save_pretrained(folder, safe_serialization=True)


def build() -> Any:
    """The pipeline itself, in memory."""
    text_encoder, unet, vae = _text_encoder(), _unet(), _vae()
    for seed, module in enumerate((text_encoder, unet, vae), start=SEED):
        _fill(module, seed)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=77),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def vocabulary() -> dict[str, int]:
    """A token for each byte, within a word and at its end, in GPT-2's spelling of bytes; and CLIP's two marks."""
    letters = _gpt2_letters()
    tokens = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    return {token: i for i, token in enumerate(tokens)}


def _gpt2_letters() -> list[str]:
    """The printable character that stands for each byte: itself, or one from 256 on (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]


def _text_encoder() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary()),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def _fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights of unit gain; uniform ones, whose arithmetic is exact: normal ones differ between CPUs."""
    random = np.random.Generator(np.random.PCG64(seed))
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim < 2:
            torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
            continue
        bound = np.float32((3 / parameter[0].numel()) ** 0.5)
        values = (random.random(tuple(parameter.shape), dtype=np.float32) * 2 - 1) * bound
        parameter.data.copy_(torch.from_numpy(values))


if __name__ == "__main__":
    write_tiny(Path(sys.argv[1]))
