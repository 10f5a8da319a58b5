"""Previews: the latents of an unfinished run -> a small picture, by a linear map fitted to the VAE at load.

The map takes each latent pixel with its eight neighbours to a patch of the picture: a few matrix products where the VAE
is a network. It is fitted to what the VAE makes of noise, so it needs no pictures to learn from.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # its name everywhere
from PIL import Image

from worker.engine.run import Run
from worker.pipelines.schedulers import is_flow

Picture = npt.NDArray[np.uint8]
LONGEST: Final = 256  # pixels of a preview's longer side, at most
SIDE: Final = 8  # of the latents that the map is fitted to
SAMPLES: Final = 16  # of them: 1,024 equations for, with sixteen channels, 145 unknowns
PACKED: Final = ["latents", "height", "width", "vae_scale_factor"]  # what Flux' and Qwen-Image's unpacking takes
RIDGE: Final = 1e-3  # of each unknown's equations


@dataclass(frozen=True, slots=True, eq=False)
class Previewer:
    """`weights` is (9 * channels + 1, 3 * patch * patch), on the CPU; `patch` the pixels a side of a latent pixel."""

    weights: torch.Tensor
    patch: int

    def picture(self, latents: torch.Tensor) -> Picture:
        """(channels, height, width), on any device -> (height, width, 3) of at most LONGEST pixels a side."""
        height, width = latents.shape[1:]
        drawn = _neighbours(latents[None].to("cpu", torch.float32)) @ self.weights
        pixels = F.pixel_shuffle(drawn.T.view(1, -1, height, width), self.patch)[0]
        picture = Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
        return np.asarray(picture)


def fit(pipe: Any, side: int) -> Previewer | None:
    """The map for a pipeline whose pictures have `side` pixels or so; None for latents that are no picture's."""
    vae = getattr(pipe, "vae", None)
    channels = getattr(getattr(vae, "config", None), "latent_channels", None) or getattr(vae, "z_dim", None)
    if vae is None or channels is None or not _is_readable(pipe):
        return None
    noise = torch.randn(SAMPLES, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pictures = _decoded(vae, noise)
        factor = pictures.shape[-1] // SIDE
        patch = max(factor, 1)
        while patch % 2 == 0 and side // factor * patch > LONGEST:
            patch //= 2
        seen = _neighbours(noise)
        wanted = F.pixel_unshuffle(F.avg_pool2d(pictures, factor // patch), patch).movedim(1, -1).flatten(0, 2)
        ridge = RIDGE * len(seen) * torch.eye(seen.shape[1])
        return Previewer(torch.linalg.solve(seen.T @ seen + ridge, seen.T @ wanted), patch)


def follow(run: Run, pipe: Any, previewer: Previewer | None, height: int, width: int) -> None:
    """Have `run.sketch` answer from what the noise scheduler of `pipe`, which is the run's own, was last given.

    Until someone asks it costs what a dict of three references costs.
    """
    if previewer is None:
        return
    scheduler, last = pipe.scheduler, dict[str, Any]()
    step = scheduler.step
    names = list(inspect.signature(step).parameters)

    @wraps(step)  # pipelines look at its signature
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last.update(zip(names, args, strict=False), **kwargs)
        return result

    def sketch() -> Callable[[], Picture] | None:
        if not last:
            return None
        given, index = dict(last), getattr(scheduler, "step_index", None)

        def draw() -> Picture:
            with torch.inference_mode():
                clean = estimate(scheduler, index, given["model_output"], given["timestep"], given["sample"])
                return previewer.picture(_unpacked(pipe, clean, height, width))

        return draw

    scheduler.step = noted
    run.sketch = sketch


def leave(pipe: Any) -> None:
    """Undo what `follow` did to the scheduler: a circle, that would keep the last step's latents."""
    vars(pipe.scheduler).pop("step", None)


def estimate(
    scheduler: Any, index: int | None, output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> torch.Tensor:
    """What the denoiser takes the clean latents for: `output` is what it said of `sample`; `index` steps were made."""
    config = scheduler.config
    kind = getattr(config, "prediction_type", "epsilon")
    if kind == "sample":
        return output
    if is_flow({"_class_name": type(scheduler).__name__, **config}):
        return sample - float(scheduler.sigmas[(index or 1) - 1]) * output
    signal, noise = _scales(scheduler, index, timestep)
    if kind == "v_prediction":
        total = signal**2 + noise**2
        return (sample * signal - output * (noise * math.sqrt(total))) / total
    return (sample - output * noise) / signal


def _scales(scheduler: Any, index: int | None, timestep: Any) -> tuple[float, float]:
    """How much of signal and of noise the sample had before the step: sample = signal * clean + noise * noise."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or index is None:
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        return signal**0.5, (1 - signal) ** 0.5
    sigma = sigmas[index - 1]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        signal, noise = scheduler._sigma_to_alpha_sigma_t(sigma)  # noqa: SLF001  # diffusers has no other name for it
        return float(signal), float(noise)
    return 1.0, float(sigma)  # Euler and Heun keep the signal as it is, and add the noise to it


def _neighbours(latents: torch.Tensor) -> torch.Tensor:
    """Each latent pixel with its eight neighbours, and a one: (samples * height * width, 9 * channels + 1)."""
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    return F.pad(F.unfold(padded, 3).movedim(1, -1).flatten(0, 1), (0, 1), value=1.0)


def _decoded(vae: Any, noise: torch.Tensor) -> torch.Tensor:
    """What the VAE makes of latents as the denoiser knows them: (samples, 3, height, width), on the CPU."""
    config = vae.config
    scaling, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
    mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    latents = noise / scaling
    if mean is not None and spread is not None:
        latents = latents * torch.tensor(spread).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    latents = latents + shift
    kernel = next(parameter for parameter in vae.parameters() if parameter.ndim >= 4)
    if kernel.ndim == 5:  # it is a video's, and a picture is one of one frame
        latents = latents[:, :, None]
    made = torch.cat([vae.decode(one[None].to(kernel), return_dict=False)[0].float().cpu() for one in latents])
    return made[:, :, 0] if made.ndim == 5 else made


def _is_readable(pipe: Any) -> bool:
    """Whether the latents of a step are one picture's: (1, channels, height, width), or packed as Flux packs them."""
    unpack = getattr(pipe, "_unpack_latents", None)
    is_known = not unpack or list(inspect.signature(unpack).parameters) == PACKED
    return is_known and hasattr(pipe, "image_processor") and not hasattr(pipe, "_unpack_latents_with_ids")


def _unpacked(pipe: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(channels, height, width) of the latents of a step."""
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)  # noqa: SLF001  # as it does
    return latents[0] if latents.ndim == 4 else latents[0, :, 0]
