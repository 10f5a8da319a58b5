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
from worker.pipelines import schedulers
from worker.pipelines.load import targets
from worker.pipelines.tiny_model import build

torch.set_num_threads(1)

NOISE_SCHEDULERS = ("ddim", "euler", "dpmpp_2m", "euler_a", "unipc")


@dataclass(frozen=True)
class Family:
    """`request(i)` gives the i-th request's keyword arguments, each of another length, guidance and content."""

    pipe: Any
    request: Callable[[int], dict[str, Any]]
    schedulers: tuple[str, ...] = NOISE_SCHEDULERS

    def make(self, i: int, run: Run | None = None) -> torch.Tensor:
        """Request i, by the unmodified pipeline; latents."""
        pipe = copy.copy(self.pipe)
        pipe.scheduler = schedulers.make(self.schedulers[i % len(self.schedulers)], self.pipe.scheduler.config)

        def count(_pipe, index, _timestep, tensors):
            if run:
                run.step = index + 1
            return tensors

        return pipe(
            **self.request(i),
            generator=torch.Generator("cpu").manual_seed(i),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=count,
        )[0]

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


def together(family: Family, runs: list[Run], arrivals: list[int], **options: Any) -> Log:
    """Make the runs in one engine, run i added before step arrivals[i]; the forwards it took."""
    log = Log()
    engine = Engine(targets(family.pipe), log, **options)
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


def sdxl() -> Family:
    unet = D.UNet2DConditionModel(
        **UNET,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
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

    def request(i: int) -> dict[str, Any]:
        pooled = {
            "pooled_prompt_embeds": noise(1, 32, seed=200 + i),
            "negative_pooled_prompt_embeds": noise(1, 32, seed=300 + i),
        }
        return embeds(i, 64) | pooled | {"height": 32, "width": 32}

    parts = absent("text_encoder", "tokenizer", "tokenizer_2")
    pipe = D.StableDiffusionXLPipeline(
        unet=unet,
        scheduler=D.EulerDiscreteScheduler(),
        vae=vae(),
        text_encoder_2=encoder,
        add_watermarker=False,
        **parts,
    )
    return Family(pipe, request)


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
    scheduler = D.FlowMatchEulerDiscreteScheduler()
    pipe = D.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae(), **absent(*names))
    return Family(pipe, request, ("flow_euler",))


def flux() -> Family:
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
        guidance_embeds=True,
    ).eval()

    def request(i: int) -> dict[str, Any]:
        return {
            "prompt_embeds": noise(1, 7, 32, seed=i),
            "pooled_prompt_embeds": noise(1, 32, seed=200 + i),
            "num_inference_steps": 3 + i % 4,
            "guidance_scale": 2.0 + i % 3,
            "height": 32,
            "width": 32,
        }

    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = D.FlowMatchEulerDiscreteScheduler()
    pipe = D.FluxPipeline(transformer=transformer, scheduler=scheduler, vae=vae(), **absent(*names))
    return Family(pipe, request, ("flow_euler",))


def wan() -> Family:
    """Video, whose pipeline calls the denoiser twice a step."""
    transformer = D.WanTransformer3DModel(
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
    decoder = D.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()

    def request(i: int) -> dict[str, Any]:
        return embeds(i, 32, tokens=9) | {"height": 16, "width": 16, "num_frames": 9}

    pipe = D.WanPipeline(
        transformer=transformer,
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=decoder,
        **absent("text_encoder", "tokenizer"),
    )
    return Family(pipe, request, ("flow_euler",))


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
    mask = torch.ones(1, 7, dtype=torch.long)

    def request(i: int) -> dict[str, Any]:
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
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
    mask = torch.ones(1, 7, dtype=torch.long)

    def request(i: int) -> dict[str, Any]:
        wide = {"height": 16, "width": 64} if i % 2 else {"height": 32, "width": 32}  # as many tokens, other positions
        asked = embeds(i, 16) | {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask} | wide
        return asked | {"true_cfg_scale": asked.pop("guidance_scale")}

    pipe = D.QwenImagePipeline(
        transformer=transformer,
        scheduler=D.FlowMatchEulerDiscreteScheduler(),
        vae=decoder,
        **absent("text_encoder", "tokenizer"),
    )
    return Family(pipe, request, ("flow_euler",))


FAMILIES: dict[str, Callable[[], Family]] = {
    "SD": sd,
    "SD img2img": sd_img2img,
    "SD ControlNet": sd_controlnet,
    "SDXL": sdxl,
    "SD3": sd3,
    "Flux": flux,
    "QwenImage": qwen_image,
    "Wan": wan,
    "LTX": ltx,
}


def build_family(name: str) -> Family:
    """The family of that name, of the same weights every time, its pipeline quiet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = FAMILIES[name]()
    family.pipe.set_progress_bar_config(disable=True)
    return family
