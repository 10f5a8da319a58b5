"""The model card: what the bundled model is, where it comes from, and what it can do by the figures measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.train.pictures import COLOURS, KEPT
from models.train.sources import FLAT, PICTURES, WORDS

USES = {PICTURES: "the 3D pictures", WORDS: "English names and keywords", FLAT: "the flat pictures of one adapter"}
FOUND = ("first", "among_five")
STATISTICS = ("brightness", "saturation", "shading")


def write(folder: Path) -> None:
    """Write README.md from the folder's evaluation.json; figures not yet measured are left out."""
    file = folder / "evaluation.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    (folder / "README.md").write_text(_card(figures))


def _card(figures: dict[str, Any]) -> str:
    return "\n".join((_head(), *_results(figures), *_speed(figures), _limits(figures)))


def _head() -> str:
    sources = "\n".join(f"| {p.name} | {p.version} | {p.licence} | {use} |" for p, use in USES.items())
    return f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---

# Safelight's bundled model

A small text-to-image model that paints emoji-like pictures of 64x64 pixels: {KEPT} concepts, listed in `names.tsv`
(name, tab, code point), by name, by keyword, or in one of {len(COLOURS)} colours. It is there so that a newcomer sees
the service work at once, on a CPU and without a download, and so that tests and benchmarks run what they would run with
a large checkpoint. It is a standard Stable Diffusion folder:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("models/emoji")
pipe("a slice of pizza", num_inference_steps=20, guidance_scale=5).images[0]
pipe.load_lora_weights("models/emoji/loras", weight_name="flat.safetensors")  # or night.safetensors
```

## Data

| package (npm) | version | licence | what for |
|---|---|---|---|
{sources}

The pictures are Microsoft's Fluent Emoji (MIT). Names and keywords were matched by code point; skin-tone variants, the
faces of clocks, people, symbols and flags were left out, and of pictures that are nearly alike all but one. No people's
pictures and no scraped data were used. The weights are under the MIT licence, as their sources are.

## Recipe

`python -m models.train all` makes everything from the packages; every part resumes from its checkpoint.

- Pictures: of each concept 24 in changing size, place and side, and 10 recoloured in 5 of the {len(COLOURS)} colours.
- Captions, drawn anew each time: the name, short sentences, keywords, mixtures; a colour before or after; 10 % empty.
- Autoencoder: 64x64 pixels to 8x8 latents of 16 channels, 3.9 M parameters, mean squared error and edges, KL weight
  1e-4, running averages, latents normalised to deviation 1; then its decoder alone.
- Text encoder: CLIP's architecture, two layers of width 256, a vocabulary of 1,800 learnt from the captions.
- Denoiser: 14.0 M parameters, two levels of 128 and 224 channels with cross-attention, v-prediction over 1,000
  timesteps (scaled linear betas to 0.02), AdamW at 8e-4 falling to zero, batches of 64, running averages; from step
  5,300 on with few poses of each concept. Beside it a linear reader, thrown away later, must tell a caption's concept
  from the text encoder's last tokens: so rare keywords are learnt from text alone.
- The published weights have 14,000 steps. Their rate had fallen to zero at 5,300 already, began again at 5e-4, and fell
  to zero at 14,000; the reader was there from step 7,800 on, reading 128 captions a step until 9,000, then 32.
- Adapters: LoRA on every attention projection; `flat` from Fluent's flat style, `night` from a neon palette on a dark
  ground. Base and text encoder stay as they are."""


def _results(figures: dict[str, Any]) -> list[str]:
    if "names" not in figures:
        return []
    unseen, negative = figures["unseen_colours"], figures["negative_prompt"]
    prompts = {
        "200 names, one picture each": figures["names"],
        "100 keywords that at most three concepts share": figures["keywords"],
        "40 short sentences": figures["sentences"],
        "40 colours before objects they never stood before (compared in grey)": unseen,
    }
    adapters = {
        f"{style} at {weight}": row for style, weights in figures["adapters"].items() for weight, row in weights.items()
    }
    return [
        f"""
## What it can do

One picture a prompt from a fixed seed, 20 steps, guidance 5; the nearest kept picture by pixels at 32x32, centred, as
it is or mirrored. `python -m models.train evaluate` measures it again.

{_table(("prompts", "right one first", "among the first five"), prompts, FOUND)}

- Of the never seen pairs {_percent(unseen["colour"])} have the colour asked for, {_percent(unseen["both"])} both.
- The autoencoder's PSNR over all kept pictures is {figures["autoencoder"]["psnr"]} dB.
- Three seeds of one prompt differ by {figures["seeds"]["mean_difference"]} of 255 on average.
- {negative["count"]} pictures of broad words ("bird"), painted again with what they showed as the negative prompt:
  {_percent(negative["still_shown"])} still show it.

{_table(("guidance", "first", "among five", "saturation"), figures["guidance"], (*FOUND, "saturation"))}

{_table(("steps", "first", "among five", "difference from 50"), figures["steps"], (*FOUND, "difference_from_last"))}

{_table(("adapter", *STATISTICS), adapters, STATISTICS)}

Brightness is the whole picture's (of 255), saturation the object's (of 1), shading the share of the object's
neighbouring pixels, at half the size, that differ by 5 to 24 of 255."""
    ]


def _table(header: Sequence[str], rows: dict[str, dict[str, Any]], fields: Sequence[str]) -> str:
    lines = [header, ["---"] * len(header)]
    for what, row in rows.items():
        lines.append([what, *(_percent(row[f]) if f in FOUND else str(row[f]) for f in fields)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _speed(figures: dict[str, Any]) -> list[str]:
    if "timing" not in figures:
        return []
    timing = figures["timing"]
    forwards = timing["milliseconds_a_forward"]
    return [
        f"""
## Speed

On one thread of a server's CPU, fp32: loading takes {timing["load_seconds"]} s, a picture of 20 steps
{timing["seconds_a_picture"]} s. The weights are {timing["weights_bytes"] / 1e6:.1f} MB. A forward of the denoiser,
by its number of rows (the best rate of rows is {timing["best_over_two"]} times that of two rows):

| rows | {" | ".join(forwards)} |
|{"---|" * (1 + len(forwards))}
| ms | {" | ".join(str(t) for t in forwards.values())} |"""
    ]


def _limits(figures: dict[str, Any]) -> str:
    missed = figures.get("names", {}).get("not_among_five", [])
    lost = f"\n- Of the 200 names tried these came out as something else: {', '.join(missed)}." if missed else ""
    return f"""
## Limits

- It knows the concepts of `names.tsv` and no others; anything else comes out as one of them, or as a mixture. It does
  not count, place or combine objects: "a fox and an owl" is one animal or a blend.
- Words are matched as the captions use them, lower case, English; a prompt of more than 30 tokens is refused.
- Colours: {", ".join(COLOURS)}. Each recolours the whole object.
- Pictures are 64x64; small text, thin lines and faces are soft, as 8x8 latents leave them.
- Lefts and rights are alike to it: training pictures were mirrored.{lost}
"""
