"""The denoisers of the GPU benchmark: the real architectures at the real sizes, of random weights, and tiny ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel


@dataclass(frozen=True)
class Shape:
    """A denoiser at a resolution: how it is built, its arguments, and what a picture takes of it."""

    title: str
    build: Callable[[], torch.nn.Module]
    arguments: Callable[[int], dict[str, Any]]
    rows: int  # of a picture and step
    steps: int
    floor: float  # images/s of one H200 whose arithmetic never waits (research: 790 TFLOP/s bf16)
    aim: float  # images/s to reach


def unet(config: Mapping[str, Any], side: int, tokens: int, *, pooled: int = 0) -> Callable[[int], dict[str, Any]]:
    """The arguments of a UNet with latents of `side`, as a function of the rows."""

    def arguments(rows: int) -> dict[str, Any]:
        found = {
            "sample": torch.randn(rows, 4, side, side),
            "timestep": torch.full((rows,), 500.0),
            "encoder_hidden_states": torch.randn(rows, tokens, config["cross_attention_dim"]),
            "return_dict": False,
        }
        if pooled:
            found["added_cond_kwargs"] = {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.ones(rows, 6)}
        return found

    return arguments


def flux(config: Mapping[str, Any], side: int, tokens: int) -> Callable[[int], dict[str, Any]]:
    places = torch.zeros(side * side, 3)
    places[:, 1], places[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side

    def arguments(rows: int) -> dict[str, Any]:
        found = {
            "hidden_states": torch.randn(rows, side * side, config["in_channels"]),
            "encoder_hidden_states": torch.randn(rows, tokens, config["joint_attention_dim"]),
            "pooled_projections": torch.randn(rows, config["pooled_projection_dim"]),
            "timestep": torch.full((rows,), 0.5),
            "img_ids": places,
            "txt_ids": torch.zeros(tokens, 3),
            "return_dict": False,
        }
        return found | ({"guidance": torch.full((rows,), 3.5)} if config["guidance_embeds"] else {})

    return arguments


SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL = {"block_out_channels": (32, 64), "norm_num_groups": 8}
TINY_SD15 = (
    SD15
    | SMALL
    | {
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
)
TINY_SDXL = (
    SDXL
    | SMALL
    | {
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 4),
        "projection_class_embeddings_input_dim": 32 + 6 * 256,
    }
)
TINY_FLUX = FLUX | {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def of_unet(config: Mapping[str, Any]) -> Callable[[], torch.nn.Module]:
    return partial(UNet2DConditionModel, **config)


def of_flux(config: Mapping[str, Any]) -> Callable[[], torch.nn.Module]:
    return partial(FluxTransformer2DModel, **config)


# 20 steps with guidance for the UNets, 28 without for Flux: what MLPerf and the model's card take.
SHAPES: dict[str, dict[str, Shape]] = {
    "full": {
        "sd15": Shape("SD 1.5, 512x512", of_unet(SD15), unet(SD15, 64, 77), 2, 20, 22.8, 15.0),
        "sdxl": Shape("SDXL, 1024x1024", of_unet(SDXL), unet(SDXL, 128, 77, pooled=1280), 2, 20, 2.81, 2.1),
        "flux": Shape("Flux-shaped, 1024x1024", of_flux(FLUX), flux(FLUX, 64, 512), 1, 28, 0.376, 0.0),
    },
    "tiny": {
        "sd15": Shape("SD 1.5, tiny", of_unet(TINY_SD15), unet(TINY_SD15, 8, 7), 2, 3, 0.0, 0.0),
        "sdxl": Shape("SDXL, tiny", of_unet(TINY_SDXL), unet(TINY_SDXL, 8, 7, pooled=32), 2, 3, 0.0, 0.0),
        "flux": Shape("Flux, tiny", of_flux(TINY_FLUX), flux(TINY_FLUX, 4, 7), 1, 3, 0.0, 0.0),
    },
}
