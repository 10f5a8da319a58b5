"""One command from npm packages to the weights of models/emoji; every part goes on where it stopped."""

import argparse
import json
import shutil
from pathlib import Path

import torch

from models.train import autoencoder, denoiser, lora, pictures
from models.train.evaluate import evaluate
from models.train.export import export
from models.train.seed import seed
from models.train.sources import Emoji, emojis
from models.train.timing import timing

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models" / "emoji"
# How many steps the published weights had: where the learning rate would be zero, and where training ended.
STEPS = {"autoencoder": 3800, "decoder": 560, "denoiser": 14000, "lora": 300}
UNTIL = STEPS | {"autoencoder": 2700}
SMOKE = 50  # steps of each part in a trial of the whole way
TRIAL = ("fetch", "autoencoder", "decoder", "denoiser", "lora", "export")
ALL = (*TRIAL, "evaluate", "timing")


def main() -> None:
    """Parse the command line and run the parts it names."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    print(f"seeds: pictures {pictures.SEED}; weights 0; step n of a training draws from seed n; {torch.__version__}")
    every = TRIAL if options.smoke else ALL
    for part in every if options.part == "all" else (options.part,):
        print(f"{part}: {run(part, options)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    parser.add_argument("part", choices=("all", "seed", *ALL), help="seed: go on from the published weights")
    parser.add_argument("--work", type=Path, default=ROOT / "var" / "train", help="packages, checkpoints, sheets")
    parser.add_argument("--target", type=Path, help="the model's folder; models/emoji, in a trial WORK/emoji")
    parser.add_argument("--steps", type=int, help=f"of a training, after which its rate is zero; {STEPS}")
    parser.add_argument("--until", type=int, help="stop at this step; a later call goes on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--smoke", action="store_true", help=f"a trial of the whole way: {SMOKE} steps of each training"
    )
    return parser


def run(part: str, options: argparse.Namespace) -> str:
    """Run one part; what is to be said of it."""
    work: Path = options.work
    target = options.target or (work / "emoji" if options.smoke else BUNDLED)
    if part == "timing":
        return json.dumps(timing(target), indent=1)
    if part == "evaluate":
        figures = evaluate(target, pictures.keep(emojis(work / "npm")), work / "evaluation")
        if target == BUNDLED:
            _publish(work / "evaluation")
        return json.dumps(figures, indent=1)
    if part == "seed":
        seed(BUNDLED, work, UNTIL["denoiser"])
        return f"the published weights as checkpoints in {work}; go on with denoiser --steps N --until N"
    kept, pool = pictures.pool(work)
    if part in STEPS:
        return _train(part, kept, pool, options)
    if part == "export":
        return f"{export(work, kept, pool, target) / 1e6:.2f} MB of weights in {target}"
    return f"{len(kept)} concepts, {len(pool.images)} pictures"


def _publish(sheets: Path) -> None:
    """Put the README's picture and the tests' references where they are committed."""
    for sheet, home in (("gallery.png", "docs/images/emoji.png"), ("references.webp", "tests/models/references.webp")):
        (ROOT / home).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sheets / sheet, ROOT / home)


def _train(part: str, kept: list[Emoji], pool: pictures.Pool, options: argparse.Namespace) -> str:
    steps = options.steps or STEPS[part]
    until = options.until or (SMOKE if options.smoke else min(steps, UNTIL[part]))
    work, device = options.work, _device(options.device)
    if part == "autoencoder":
        losses = {part: autoencoder.train(work, pool, steps, until, device)}
    elif part == "decoder":
        losses = {part: autoencoder.refine(work, pool, steps, until, device)}
    elif part == "denoiser":
        denoiser.forget_stale_latents(work)
        losses = {part: denoiser.train(work, kept, pool, steps, until, device)}
    else:
        losses = {style: lora.train(work, kept, pool, style, steps, until, device) for style in lora.ADAPTERS}
    return f"step {until} of {steps}, " + ", ".join(f"{what} loss {loss:.4f}" for what, loss in losses.items())


def _device(wanted: str) -> str:
    found = torch.accelerator.current_accelerator(check_available=True) if wanted == "auto" else torch.device(wanted)
    return str(found or "cpu")


if __name__ == "__main__":
    main()
