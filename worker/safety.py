"""Safety: an optional look at every finished picture, by a classifier that the catalog names for the model.

It computes on the CPU, in the finisher's threads: neither the step loop nor the device's memory knows of it.
"""

import json
import threading
from typing import Any, Final, Protocol

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image, ImageFilter
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPImageProcessor

from app.core import model_check
from app.core.catalog import Policy, SafetySpec
from app.core.errors import ConfigError, ContentRefused
from app.core.job import Safety
from worker.encode import Picture

CONCEPTS: Final = "StableDiffusionSafetyChecker"
BLUR: Final = 8  # a picture is blurred until it has about so many spots to a side


class Checker(Protocol):
    """Looks at pictures from any thread."""

    @property
    def policy(self) -> Policy:
        """What happens to a picture that is flagged."""

    def look(self, picture: Picture) -> Safety:
        """What there is to say of a picture (height, width, 3)."""


def judged(checker: Checker | None, picture: Picture) -> tuple[Picture, Safety | None]:
    """The picture as it may be seen, and what was said of it. Raises ContentRefused."""
    if checker is None:
        return picture, None
    safety = checker.look(picture)
    if not safety.flagged or checker.policy == "flag":
        return picture, safety
    if checker.policy == "refuse":
        raise ContentRefused("the safety checker refused a picture; change the prompt, or try another seed")
    return blurred(picture), safety.model_copy(update={"blurred": True})


class Classifier:
    """An image classifier of transformers: a picture is flagged when one of `labels` reaches `threshold`."""

    def __init__(self, spec: SafetySpec) -> None:
        self.policy = spec.policy
        self._model = AutoModelForImageClassification.from_pretrained(
            spec.source, use_safetensors=True, local_files_only=True, dtype=torch.float32
        ).eval()
        self._processor = AutoImageProcessor.from_pretrained(spec.source, local_files_only=True, backend="pil")
        self._names: list[str] = [name for _, name in sorted(self._model.config.id2label.items())]
        self._labels, self._threshold = spec.labels, spec.threshold
        unknown = sorted(set(spec.labels) - set(self._names))
        if unknown or not spec.labels:
            raise ConfigError(
                f"{spec.source}: labels must be some of {', '.join(self._names)}; got {list(spec.labels)}"
            )

    def look(self, picture: Picture) -> Safety:
        inputs = self._processor(images=Image.fromarray(picture), return_tensors="pt")
        with torch.inference_mode():
            found = self._model(**inputs).logits.float().softmax(-1)[0].tolist()
        scores = {name: round(score, 4) for name, score in zip(self._names, found, strict=True)}
        return Safety(flagged=any(scores[label] >= self._threshold for label in self._labels), scores=scores)


class ConceptChecker:
    """Stable Diffusion's own checker: how much nearer than allowed a picture is to the nearest of its concepts."""

    def __init__(self, spec: SafetySpec) -> None:
        if spec.labels:
            raise ConfigError(f"{spec.source}: {CONCEPTS} has its own concepts and thresholds; leave labels out")
        self.policy = spec.policy
        self._model = StableDiffusionSafetyChecker.from_pretrained(
            spec.source, use_safetensors=True, local_files_only=True, dtype=torch.float32
        ).eval()
        self._processor = CLIPImageProcessor.from_pretrained(spec.source, local_files_only=True)
        self._embeds: torch.Tensor | None = None
        # The checker says yes or no, and what it compared is inside: a hook sees it.
        self._model.visual_projection.register_forward_hook(self._see)
        self._lock = threading.Lock()

    def look(self, picture: Picture) -> Safety:
        inputs = self._processor(images=Image.fromarray(picture), return_tensors="pt")
        with self._lock, torch.inference_mode():
            # It blackens what it flags; whether that is wanted is the policy's matter.
            _, flags = self._model(clip_input=inputs.pixel_values, images=[np.zeros((1, 1, 3), np.uint8)])
            near = cosine_distance(self._embeds, self._model.concept_embeds)
            score = float((near - self._model.concept_embeds_weights).max())
        return Safety(flagged=bool(flags[0]), scores={"concept": round(score, 4)})

    def _see(self, _module: Any, _inputs: Any, embeds: torch.Tensor) -> None:
        self._embeds = embeds


def open_checker(spec: SafetySpec) -> Checker:
    """The checker whose folder `spec` names. Raises ConfigError; of its files nothing runs and no pickle is read."""
    model_check.check_files(spec.source)
    try:
        kinds = json.loads((spec.source / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        if kinds[0] == CONCEPTS:
            return ConceptChecker(spec)
        if not kinds[0].endswith("ForImageClassification"):
            raise ConfigError(f"{spec.source}: {kinds[0]!r} is neither an image classifier nor {CONCEPTS}")
        return Classifier(spec)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"the safety checker in {spec.source} cannot be loaded: {error}") from error


def blurred(picture: Picture) -> Picture:
    """The picture with nothing left to recognize."""
    height, width = picture.shape[:2]
    image = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(max(height, width) / BLUR))
    return np.asarray(image)
