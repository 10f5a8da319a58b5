"""Painter: the bundled model by plain diffusers, as the other servers use it."""

import copy
import io
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from worker.pipelines import schedulers
from worker.pipelines.tasks import Picture, to_picture

MODEL = Path(__file__).resolve().parents[2] / "models" / "emoji"
SIDE = 64


def how(wish: dict[str, Any]) -> tuple[Any, ...]:
    """What one pipeline call has for all of its pictures."""
    return wish["num_inference_steps"], wish["guidance_scale"], wish["scheduler"]


def png(picture: Picture) -> bytes:
    """At the level that Safelight compresses at."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


class Painter:
    """One warm pipeline; a call makes as many pictures of equal settings as it is given."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ.get("SAFELIGHT_THREADS", "1")))
        self.pipe = StableDiffusionPipeline.from_pretrained(MODEL, use_safetensors=True, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)

    def paint(self, wishes: Sequence[dict[str, Any]]) -> list[bytes]:
        """PNG files; wishes of other settings are other calls."""
        order = sorted(range(len(wishes)), key=lambda i: how(wishes[i]))
        made: dict[int, bytes] = {}
        for _, group in groupby(order, key=lambda i: how(wishes[i])):
            places = list(group)
            made |= zip(places, self._call([wishes[i] for i in places]), strict=True)
        return [made[i] for i in range(len(wishes))]

    def _call(self, wishes: Sequence[dict[str, Any]]) -> list[bytes]:
        pipe = copy.copy(self.pipe)
        steps, guidance, scheduler = how(wishes[0])
        pipe.scheduler = schedulers.make(scheduler, self.pipe.scheduler.config)
        with torch.inference_mode():
            pictures = pipe(
                prompt=[wish["prompt"] for wish in wishes],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(wish["seed"]) for wish in wishes],
                width=SIDE,
                height=SIDE,
                output_type="np",
                return_dict=False,
            )[0]
        return [png(to_picture(picture)) for picture in pictures]
