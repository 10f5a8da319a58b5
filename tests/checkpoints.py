"""Whole checkpoints with tiny random weights, tokenizers and text encoders included: as folders and as single files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as D  # noqa: N812
import safetensors.torch
import torch
import transformers as T  # noqa: N812

from tests.tiny import UNET, flow, vae
from worker.pipelines.tiny_model import build, vocabulary

WIDTH = 32  # of CLIP's embeddings
STAGES = 2  # of the UNets


def write(name: str, folder: Path) -> Path:
    """The checkpoint's diffusers folder; SD, SDXL, SD3 or Flux."""
    T.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        pipe = BUILDERS[name]()
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def write_single(folder: Path, file: Path, config: Path) -> tuple[Path, Path]:
    """The weights of an SD or SDXL folder in one file as their authors publish them, and the folder without weights."""
    pipe = D.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in _original(pipe).items()}, file)
    shutil.copytree(folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    return file, config


def controlnet(seed: int) -> Any:
    """A ControlNet for the tiny Stable Diffusion."""
    net = D.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(4, 8, 8, 16),
    ).eval()
    random = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():  # a new ControlNet is all zeros where it joins
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return net


def four_times() -> Any:
    """diffusers' x4 upscaler: the small picture beside the latents, its noise level as a class."""
    parts = build().components
    unet = {**UNET, "in_channels": 7, "cross_attention_dim": 32, "attention_head_dim": 4, "num_class_embeds": 100}
    autoencoder = D.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.08333,
    )
    torch.manual_seed(0)
    return D.StableDiffusionUpscalePipeline(
        vae=autoencoder.eval(),
        unet=D.UNet2DConditionModel(**unet).eval(),
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        low_res_scheduler=D.DDPMScheduler(),
        scheduler=parts["scheduler"],
    )


def two_times() -> Any:
    """diffusers' latent upscaler: the picture's latents, twice as large, beside the noise."""
    parts = build().components
    torch.manual_seed(0)
    unet = D.UNet2DConditionModel(
        **UNET, in_channels=8, out_channels=5, cross_attention_dim=32, attention_head_dim=4, time_cond_proj_dim=160
    )
    return D.StableDiffusionLatentUpscalePipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=unet.eval(),
        scheduler=D.EulerDiscreteScheduler(),
    )


def table(name: str, source: Path, **options: Any) -> str:
    """Its entry in models.toml; options are TOML's own text."""
    is_flow = name.startswith(("sd3", "flux"))
    scheduler = "flow_euler" if is_flow else "ddim"
    lines = {"source": json.dumps(str(source)), "schedulers": json.dumps([scheduler])}
    if name.startswith("flux"):
        lines["accepts"] = '["guidance_scale"]'
    lines |= options
    head = "\n".join(f"{key} = {value}" for key, value in lines.items() if not isinstance(value, dict))
    defaults = f'width = 32\nheight = 32\nnum_inference_steps = 4\nguidance_scale = 3.0\nscheduler = "{scheduler}"'
    if name.startswith("sd15"):  # its VAE makes eight pixels of one latent
        defaults = defaults.replace("32", "64")
    limits = "min_side = 16\nmax_side = 64\nmultiple_of = 8"
    return f"[models.{name}]\n{head}\n[models.{name}.defaults]\n{defaults}\n[models.{name}.limits]\n{limits}\n"


def _tokenizer() -> Any:
    return T.CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=77)


def _clip(kind: Any, **options: Any) -> Any:
    about = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": WIDTH}
    return kind(T.CLIPTextConfig(**({"vocab_size": len(vocabulary())} | about | marks | options))).eval()


def _t5(width: int) -> dict[str, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((chr(c), -2.0) for c in (0x2581, *range(97, 123)))]
    encoder = T.T5EncoderModel(
        T.T5Config(vocab_size=len(pieces), d_model=width, d_ff=WIDTH, d_kv=8, num_layers=1, num_heads=4)
    ).eval()
    return {"encoder": encoder, "tokenizer": T.T5TokenizerFast(vocab=pieces, extra_ids=0)}


def _sdxl() -> Any:
    unet = D.UNet2DConditionModel(
        **UNET,
        cross_attention_dim=3 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )
    return D.StableDiffusionXLPipeline(
        unet=unet.eval(),
        scheduler=D.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        vae=vae(),
        text_encoder=_clip(T.CLIPTextModel),
        text_encoder_2=_clip(T.CLIPTextModelWithProjection, hidden_size=2 * WIDTH, hidden_act="gelu"),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        add_watermarker=False,
    )


def _sd3() -> Any:
    transformer = D.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )
    t5 = _t5(2 * WIDTH)
    return D.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=flow(shift=3.0),
        vae=vae(),
        text_encoder=_clip(T.CLIPTextModelWithProjection),
        text_encoder_2=_clip(T.CLIPTextModelWithProjection),
        text_encoder_3=t5["encoder"],
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=t5["tokenizer"],
    )


def _flux() -> Any:
    transformer = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    t5 = _t5(WIDTH)
    return D.FluxPipeline(
        transformer=transformer.eval(),
        scheduler=flow(),
        vae=vae(),
        text_encoder=_clip(T.CLIPTextModel),
        tokenizer=_tokenizer(),
        text_encoder_2=t5["encoder"],
        tokenizer_2=t5["tokenizer"],
    )


BUILDERS: dict[str, Callable[[], Any]] = {"SD": build, "SDXL": _sdxl, "SD3": _sd3, "Flux": _flux}


# From diffusers' names to those of the checkpoints of CompVis and Stability.

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_LAYERS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _original(pipe: Any) -> dict[str, torch.Tensor]:
    found = {f"model.diffusion_model.{_unet_name(k)}": v for k, v in pipe.unet.state_dict().items()}
    stages = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        is_square = (
            "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        )  # they have convolutions there
        found[f"first_stage_model.{_vae_name(name, stages)}"] = tensor[:, :, None, None] if is_square else tensor
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipe.text_encoder.state_dict().items()}
    if not hasattr(pipe, "text_encoder_2"):
        return found | {f"cond_stage_model.transformer.{k}": v for k, v in clip.items()}
    first = {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip.items()}
    return found | first | _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")


def _unet_name(name: str) -> str:
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *rest = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        stage, kind, number, *rest = rest
        place = _unet_place(side, int(stage), kind, int(number))
    if kind == "resnets":
        rest = [RESNET[rest[0]], *rest[1:]]
    elif kind == "downsamplers":
        rest = ["op", *rest[1:]]
    return ".".join([place, *rest])


def _unet_place(side: str, stage: int, kind: str, number: int) -> str:
    """Where a layer of a UNet with one resnet a stage lies: one more on the way up, and attention in the deep stage."""
    if side == "down_blocks":
        place = 2 * stage + 1 + (kind == "downsamplers" or number)
        return f"input_blocks.{place}.{kind == 'attentions':d}"
    if kind == "upsamplers":
        return f"output_blocks.{2 * stage + 1}.{2 if stage == 0 else 1}"
    return f"output_blocks.{2 * stage + number}.{kind == 'attentions':d}"


def _vae_name(name: str, stages: int) -> str:
    for ours, theirs in VAE_LAYERS.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    parts = name.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        side, stage, kind, number, *rest = parts[1:]
        number_there = int(stage) if side == "down_blocks" else stages - 1 - int(stage)
        inner = ["block", number] if kind == "resnets" else [kind.removesuffix("rs")]
        return ".".join([parts[0], side.removesuffix("_blocks"), str(number_there), *inner, *rest])
    return name


def _open_clip(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    found = {prefix + theirs: state[ours] for ours, theirs in names.items()}
    found[f"{prefix}text_projection"] = state["text_projection.weight"].T
    layers = {k.removeprefix("text_model.encoder.layers."): v for k, v in state.items() if ".layers." in k}
    for name, tensor in layers.items():
        number, part, *rest = name.split(".")
        place = f"{prefix}transformer.resblocks.{number}"
        if rest[0] in ("q_proj", "k_proj", "v_proj"):
            if rest[0] == "q_proj":
                three = [layers[f"{number}.{part}.{p}.{rest[1]}"] for p in ("q_proj", "k_proj", "v_proj")]
                found[f"{place}.attn.in_proj_{rest[1]}"] = torch.cat(three)
            continue
        inner = ".".join([part, *rest])
        for ours, theirs in {"self_attn": "attn", "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj"}.items():
            inner = inner.replace(ours, theirs)
        found[f"{place}.{inner}"] = tensor
    return found
