"""Real diffusers pipelines with tiny random weights, and requests for them; a row a family."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers as D  # noqa: N812  # forty class names of one library
import numpy as np
import torch
import transformers as T  # noqa: N812
from PIL import Image

from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.engine.target import Target
from worker.pipelines import load, schedulers
from worker.pipelines.arguments import progress
from worker.pipelines.tiny_model import build

torch.set_num_threads(1)

NOISE_SCHEDULERS = ("ddim", "euler", "dpmpp_2m", "euler_a", "unipc")
FLOW_SCHEDULERS = ("flow_euler",)


@dataclass(frozen=True)
class Family:
    """`request(i)` gives the i-th request's keyword arguments, each of another length, guidance and content."""

    pipe: Any
    request: Callable[[int], dict[str, Any]]
    schedulers: tuple[str, ...] = NOISE_SCHEDULERS

    def make(self, i: int, run: Run | None = None, *, scheduler: str | None = None, **options: Any) -> torch.Tensor:
        """Request i, by the unmodified pipeline; latents."""
        pipe = copy.copy(self.pipe)
        name = scheduler or self.schedulers[i % len(self.schedulers)]
        pipe.scheduler = schedulers.make(name, self.pipe.scheduler.config)
        made = pipe(
            **(self.request(i) | options),
            generator=torch.Generator("cpu").manual_seed(i),
            output_type="latent",
            return_dict=False,
            **(progress(pipe, run) if run else {}),
        )[0]
        return made[0] if isinstance(made, list) else made

    def run(self, i: int, **options: Any) -> Run:
        return Run(f"run-{i}", partial(self.make, i), steps=self.request(i)["num_inference_steps"], **options)

    def alone(self, i: int) -> torch.Tensor:
        with torch.inference_mode():
            return self.make(i)


class Log:
    """An observer that keeps every forward."""

    def __init__(self) -> None:
        self.forwards: list[tuple[str, int, int, float]] = []

    def forward(self, module_name: str, rows: int, runs: int, seconds: float) -> None:
        self.forwards.append((module_name, rows, runs, seconds))

    def of(self, module_name: str) -> list[tuple[str, int, int, float]]:
        return [entry for entry in self.forwards if entry[0] == module_name]


def together(
    family: Family, runs: list[Run], arrivals: list[int], *, targets: dict[str, Target] | None = None, **options: Any
) -> Log:
    """Make the runs in one engine, run i added before step arrivals[i]; the forwards it took."""
    log = Log()
    engine = Engine(targets or load.targets(family.pipe), log, **options)
    waiting = sorted(zip(arrivals, range(len(runs)), strict=True))
    step = 0
    while waiting or not engine.is_idle:
        while waiting and (waiting[0][0] <= step or engine.is_idle):
            engine.add(runs[waiting.pop(0)[1]])
        engine.step()
        step += 1
    engine.close()
    return log


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (side, side, 3), dtype="uint8"))


def absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def embeds(i: int, width: int, tokens: int = 7) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, width, seed=i),
        "negative_prompt_embeds": noise(1, tokens, width, seed=100 + i),
        "num_inference_steps": 3 + i % 4,
        "guidance_scale": 2.0 + i % 3,
    }


def mask(tokens: int, of: int = 7) -> torch.Tensor:
    """The first `tokens` of `of` are words."""
    return (torch.arange(of) < tokens).long()[None]


def flow(**config: Any) -> Any:
    return D.FlowMatchEulerDiscreteScheduler(**config)


def vae() -> Any:
    return D.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=1.0,
    ).eval()


UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def sd() -> Family:
    """With its real text encoder and tokenizer."""

    def request(i: int) -> dict[str, Any]:
        return {
            "prompt": "a cat " * (1 + i % 3),
            "negative_prompt": ("", "dog")[i % 2],
            "num_inference_steps": 3 + i % 5,
            "guidance_scale": (1.0, 3.0, 6.0)[i % 3],  # 1: no guidance, one row a step
            "height": 64,
            "width": 64,
        }

    return Family(build(), request)


def _sd_parts() -> dict[str, Any]:
    return {
        "vae": vae(),
        "scheduler": D.DDIMScheduler(),
        "unet": D.UNet2DConditionModel(**UNET, cross_attention_dim=32, attention_head_dim=4).eval(),
        "requires_safety_checker": False,
        **absent("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    }


def sd_img2img() -> Family:
    def request(i: int) -> dict[str, Any]:
        return embeds(i, 32) | {"image": picture(i), "strength": 0.6 + 0.05 * (i % 6)}

    return Family(D.StableDiffusionImg2ImgPipeline(**_sd_parts()), request)


def sd_inpaint() -> Family:
    def request(i: int) -> dict[str, Any]:
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 8 + 4 * (i % 6), 32))
        size = {"height": 32, "width": 32}
        return embeds(i, 32) | size | {"image": picture(i), "mask_image": mask, "strength": 0.7 + 0.05 * (i % 6)}

    return Family(D.StableDiffusionInpaintPipeline(**_sd_parts()), request)


def sd_controlnet() -> Family:
    control = D.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(16, 32),
    ).eval()
    for parameter in control.parameters():  # a new ControlNet is all zeros where it joins
        parameter.data += 0.02 * torch.randn_like(parameter)

    def request(i: int) -> dict[str, Any]:
        return embeds(i, 32) | {"image": picture(i), "height": 32, "width": 32}

    return Family(D.StableDiffusionControlNetPipeline(controlnet=control, **_sd_parts()), request)


def _sdxl_parts(**config: Any) -> dict[str, Any]:
    unet = D.UNet2DConditionModel(
        **UNET,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        **config,
    ).eval()
    encoder = T.CLIPTextModelWithProjection(
        T.CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    return {
        "unet": unet,
        "scheduler": D.EulerDiscreteScheduler(),
        "vae": vae(),
        "text_encoder_2": encoder,
        "add_watermarker": False,
        **absent("text_encoder", "tokenizer", "tokenizer_2"),
    }


def _sdxl_embeds(i: int) -> dict[str, Any]:
    return embeds(i, 64) | {
        "pooled_prompt_embeds": noise(1, 32, seed=200 + i),
        "negative_pooled_prompt_embeds": noise(1, 32, seed=300 + i),
    }


def sdxl() -> Family:
    """Half of the requests end early, as for a refiner, and each has another original size."""

    def request(i: int) -> dict[str, Any]:
        asked = _sdxl_embeds(i) | {"height": 32, "width": 32, "original_size": (64 + i, 64), "num_inference_steps": 5}
        return asked | ({"denoising_end": 0.8} if i % 2 else {})

    pipe = D.StableDiffusionXLPipeline(**_sdxl_parts(projection_class_embeddings_input_dim=80))
    return Family(pipe, request)


def sdxl_img2img() -> Family:
    def request(i: int) -> dict[str, Any]:
        return _sdxl_embeds(i) | {"image": picture(i), "strength": 0.6 + 0.05 * (i % 6)}

    return Family(D.StableDiffusionXLImg2ImgPipeline(**_sdxl_parts(projection_class_embeddings_input_dim=80)), request)


def sdxl_refiner() -> Family:
    """An aesthetic score in place of the target size, and the last part of the steps only."""

    def request(i: int) -> dict[str, Any]:
        start = {
            "image": picture(i),
            "denoising_start": 0.4,
            "aesthetic_score": 5.0 + i,
            "num_inference_steps": 5 + i % 3,
        }
        return _sdxl_embeds(i) | start

    parts = _sdxl_parts(projection_class_embeddings_input_dim=72)
    pipe = D.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    return Family(pipe, request, ("euler", "ddim"))


def sd3() -> Family:
    transformer = D.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        pooled = {
            "pooled_prompt_embeds": noise(1, 64, seed=200 + i),
            "negative_pooled_prompt_embeds": noise(1, 64, seed=300 + i),
        }
        return embeds(i, 32) | pooled | {"height": 32, "width": 32}

    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipe = D.StableDiffusion3Pipeline(transformer=transformer, scheduler=flow(), vae=vae(), **absent(*names))
    return Family(pipe, request, FLOW_SCHEDULERS)


def _flux_parts(*, guidance_embeds: bool = True) -> dict[str, Any]:
    transformer = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    ).eval()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {"transformer": transformer, "scheduler": flow(), "vae": vae(), **absent(*names)}


def _flux_embeds(i: int, tokens: int = 7) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, tokens, 32, seed=i),
        "pooled_prompt_embeds": noise(1, 32, seed=200 + i),
        "num_inference_steps": 3 + i % 4,
        "height": 32,
        "width": 32,
    }


def flux() -> Family:
    """As dev: guidance is an input of the model."""
    return Family(
        D.FluxPipeline(**_flux_parts()), lambda i: _flux_embeds(i) | {"guidance_scale": 2.0 + i % 3}, FLOW_SCHEDULERS
    )


def flux_schnell() -> Family:
    """No guidance, or of the true kind: twice a step."""

    def request(i: int) -> dict[str, Any]:
        negative = {
            "negative_prompt_embeds": noise(1, 7, 32, seed=100 + i),
            "negative_pooled_prompt_embeds": noise(1, 32, seed=300 + i),
            "true_cfg_scale": 2.0 + i,
        }
        return _flux_embeds(i) | {"num_inference_steps": 2 + i % 3} | (negative if i % 2 else {})

    return Family(D.FluxPipeline(**_flux_parts(guidance_embeds=False)), request, FLOW_SCHEDULERS)


def flux_img2img() -> Family:
    def request(i: int) -> dict[str, Any]:
        start = {"image": picture(i), "strength": 0.6 + 0.05 * (i % 6), "num_inference_steps": 4 + i % 4}
        return _flux_embeds(i) | start | {"guidance_scale": 2.0 + i % 3}

    return Family(D.FluxImg2ImgPipeline(**_flux_parts()), request, FLOW_SCHEDULERS)


def flux2() -> Family:
    transformer = D.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()
    decoder = D.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        asked = _flux_embeds(i) | {"guidance_scale": 2.0 + i % 3, "image": picture(i, 64) if i % 4 == 3 else None}
        return {k: v for k, v in asked.items() if k != "pooled_prompt_embeds"}

    parts = absent("text_encoder", "tokenizer")
    pipe = D.Flux2Pipeline(transformer=transformer, scheduler=flow(), vae=decoder, **parts)
    return Family(pipe, request, FLOW_SCHEDULERS)


def chroma() -> Family:
    transformer = D.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(7 - i % 3).bool(), "negative_prompt_attention_mask": mask(4).bool()}
        return embeds(i, 32) | masks | {"height": 32, "width": 32}

    names = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
    pipe = D.ChromaPipeline(transformer=transformer, scheduler=flow(), vae=vae(), **absent(*names))
    return Family(pipe, request, FLOW_SCHEDULERS)


def pixart() -> Family:
    transformer = D.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        use_additional_conditions=False,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(7 - i % 3), "negative_prompt_attention_mask": mask(3)}
        fixed = {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None}
        return embeds(i, 32) | masks | fixed

    pipe = D.PixArtAlphaPipeline(
        transformer=transformer,
        scheduler=D.DPMSolverMultistepScheduler(),
        vae=vae(),
        **absent("text_encoder", "tokenizer"),
    )
    return Family(pipe, request, ("dpmpp_2m", "ddim", "euler"))


def sana() -> Family:
    transformer = D.SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=32,
    ).eval()
    decoder = D.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).eval()

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(7 - i % 3), "negative_prompt_attention_mask": mask(3)}
        fixed = {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None}
        return embeds(i, 32) | masks | fixed

    parts = absent("text_encoder", "tokenizer")
    pipe = D.SanaPipeline(transformer=transformer, scheduler=flow(shift=3.0), vae=decoder, **parts)
    return Family(pipe, request, ("flow_euler", "flow_dpmpp_2m"))


def aura_flow() -> Family:
    transformer = D.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(7), "negative_prompt_attention_mask": mask(7)}
        return embeds(i, 32) | masks | {"height": 32, "width": 32}

    parts = absent("text_encoder", "tokenizer")
    return Family(
        D.AuraFlowPipeline(transformer=transformer, scheduler=flow(), vae=vae(), **parts), request, FLOW_SCHEDULERS
    )


def lumina2() -> Family:
    transformer = D.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(7 - i % 3), "negative_prompt_attention_mask": mask(4)}
        return embeds(i, 32) | masks | {"height": 32, "width": 32}

    parts = absent("text_encoder", "tokenizer")
    pipe = D.Lumina2Pipeline(transformer=transformer, scheduler=flow(), vae=vae(), **parts)
    return Family(pipe, request, FLOW_SCHEDULERS)


def z_image() -> Family:
    """Its transformer takes lists, a tensor a row, of texts of any length."""
    transformer = D.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 64, 64],
    ).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # allocated and never filled

    def request(i: int) -> dict[str, Any]:
        asked = embeds(i, 32)
        texts = {
            "prompt_embeds": [noise(5 + 9 * i, 32, seed=i)],
            "negative_prompt_embeds": [asked["negative_prompt_embeds"][0]],
        }
        return asked | texts | {"height": 32, "width": 32}

    parts = absent("text_encoder", "tokenizer")
    pipe = D.ZImagePipeline(transformer=transformer, scheduler=flow(), vae=vae(), **parts)
    return Family(pipe, request, FLOW_SCHEDULERS)


def _wan_transformer() -> Any:
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def _wan(**parts: Any) -> Family:
    decoder = D.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()

    def request(i: int) -> dict[str, Any]:
        return embeds(i, 32, tokens=9) | {"height": 16, "width": 16, "num_frames": 9}

    nothing = absent("text_encoder", "tokenizer")
    pipe = D.WanPipeline(transformer=_wan_transformer(), scheduler=flow(shift=7.0), vae=decoder, **nothing, **parts)
    return Family(pipe, request, ("flow_euler", "flow_unipc"))


def wan() -> Family:
    """Video, whose pipeline calls the denoiser twice a step."""
    return _wan()


def wan22() -> Family:
    """Two denoisers: one for the noisy steps, one for the others."""
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def cogvideox() -> Family:
    transformer = D.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    ).eval()
    decoder = D.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        return embeds(i, 32) | {"height": 16, "width": 16, "num_frames": 8}

    pipe = D.CogVideoXPipeline(
        transformer=transformer,
        scheduler=D.CogVideoXDDIMScheduler(),
        vae=decoder,
        **absent("text_encoder", "tokenizer"),
    )
    return Family(pipe, request, ("cogvideox_ddim", "cogvideox_dpm"))


def ltx() -> Family:
    transformer = D.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ).eval()
    decoder = D.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask(7 - i % 3), "negative_prompt_attention_mask": mask(4)}
        return embeds(i, 32) | masks | {"height": 32, "width": 32, "num_frames": 9}

    scheduler = D.FlowMatchEulerDiscreteScheduler()
    parts = absent("text_encoder", "tokenizer")
    return Family(
        D.LTXPipeline(transformer=transformer, scheduler=scheduler, vae=decoder, **parts), request, ("flow_euler",)
    )


def qwen_image() -> Family:
    transformer = D.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    decoder = D.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        # As many tokens, other positions.
        wide = {"height": 16, "width": 64} if i % 4 == 3 else {"height": 32, "width": 32}
        tokens = 5 + 2 * (i % 4)
        masks = {"prompt_embeds_mask": mask(tokens, tokens), "negative_prompt_embeds_mask": mask(4, tokens)}
        asked = embeds(i, 16, tokens) | masks | wide
        return asked | {"true_cfg_scale": asked.pop("guidance_scale")}

    pipe = D.QwenImagePipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=decoder,
        **absent("text_encoder", "tokenizer"),
    )
    return Family(pipe, request, FLOW_SCHEDULERS)


FAMILIES: dict[str, Callable[[], Family]] = {
    "SD": sd,
    "SD img2img": sd_img2img,
    "SD inpaint": sd_inpaint,
    "SD ControlNet": sd_controlnet,
    "SDXL": sdxl,
    "SDXL img2img": sdxl_img2img,
    "SDXL refiner": sdxl_refiner,
    "SD3": sd3,
    "Flux": flux,
    "Flux schnell": flux_schnell,
    "Flux img2img": flux_img2img,
    "Flux2": flux2,
    "Chroma": chroma,
    "QwenImage": qwen_image,
    "PixArt": pixart,
    "Sana": sana,
    "AuraFlow": aura_flow,
    "Lumina2": lumina2,
    "Z-Image": z_image,
    "Wan": wan,
    "Wan 2.2": wan22,
    "LTX": ltx,
    "CogVideoX": cogvideox,
}


def build_family(name: str) -> Family:
    """The family of that name, of the same weights every time, its pipeline quiet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = FAMILIES[name]()
    family.pipe.set_progress_bar_config(disable=True)
    return family
