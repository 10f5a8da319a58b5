"""The way from pictures to weights, on a pool of six concepts made here: no network, a few steps."""

import hashlib
import os
import random
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from models.train import autoencoder, denoiser, judge, lora, pictures, sources
from models.train.export import export
from models.train.pictures import Pool
from models.train.sheet import contact_sheet
from models.train.sources import Emoji
from models.train.words import caption, make_tokenizer

SHAPES = {
    "ball": ("ellipse", "crimson"),
    "box": ("rectangle", "navy"),
    "egg": ("ellipse", "orange"),
    "brick": ("rectangle", "brown"),
    "pea": ("ellipse", "green"),
    "tile": ("rectangle", "purple"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> list[Emoji]:
    folder = tmp_path_factory.mktemp("shapes")
    for i, (name, (shape, colour)) in enumerate(SHAPES.items()):
        image = Image.new("RGBA", (128, 128))
        getattr(ImageDraw.Draw(image), shape)((20, 20 + 8 * i, 100, 110), fill=colour)
        image.save(folder / f"{name}.png")
    return [Emoji(f"1f{i:03}", n, (f"{n} shape", "thing"), 5, folder / f"{n}.png") for i, n in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def pool(kept) -> Pool:
    """Of each concept two pictures as it is, one in blue, one flat, one at night."""
    rows = []
    for index, emoji in enumerate(kept):
        image = Image.open(emoji.picture)
        rows += [(pictures.place(image, size), index, -1, 0) for size in (0.9, 1.0)]
        rows += [(pictures.place(pictures.colourise(image, "blue"), 1.0), index, 4, 0)]
        rows += [(pictures.place(image, 1.0), index, -1, 1), (pictures.place(pictures.night(image), 1.0), index, -1, 2)]
    images, concept, colour, style = zip(*rows, strict=True)
    return Pool(np.stack(images), np.array(concept), np.array(colour), np.array(style))


@pytest.fixture(scope="module")
def work(tmp_path_factory, kept, pool) -> Path:
    """A work folder in which every part has had two steps, the denoiser's and the adapters' rates unspent."""
    folder = tmp_path_factory.mktemp("work")
    autoencoder.train(folder, pool, 10, 2, "cpu")
    denoiser.train(folder, kept, pool, 10, 2, "cpu")
    for style in lora.ADAPTERS:
        lora.train(folder, kept, pool, style, 10, 2, "cpu")
    return folder


def digest(file: Path) -> str:
    saved = torch.load(file, weights_only=True)
    hashed = hashlib.sha256(str(saved["step"]).encode())
    for part in (saved["modules"], saved["averages"]):
        for tensors in part.values():
            for name in sorted(tensors):
                hashed.update(tensors[name].numpy().tobytes())
    return hashed.hexdigest()


def goes_on(train, folder: Path, file: str) -> tuple[str, str]:
    """The state after two steps at once, and after one, a stop, and one more."""
    train(folder, until=2)
    at_once = digest(folder / file)
    (folder / file).unlink()
    train(folder, until=1)
    train(folder, until=2)
    return at_once, digest(folder / file)


def test_the_autoencoder_goes_on_as_if_it_had_never_stopped(tmp_path, pool):
    def train(folder, until):
        autoencoder.train(folder, pool, 10, until, "cpu")

    at_once, after_a_stop = goes_on(train, tmp_path, "autoencoder.pt")
    assert at_once == after_a_stop


def test_refining_the_decoder_leaves_the_latents_as_they_are(tmp_path, pool, work):
    (tmp_path / "autoencoder.pt").write_bytes((work / "autoencoder.pt").read_bytes())
    before = autoencoder.load(tmp_path)
    autoencoder.refine(tmp_path, pool, 10, 1, "cpu")
    after = autoencoder.load(tmp_path)
    assert torch.equal(autoencoder.encode(after, pool.images[:2]), autoencoder.encode(before, pool.images[:2]))
    assert not np.array_equal(autoencoder.reconstruct(after, pool.images), autoencoder.reconstruct(before, pool.images))


def test_the_denoiser_goes_on_as_if_it_had_never_stopped(tmp_path, kept, pool, work):
    (tmp_path / "autoencoder.pt").write_bytes((work / "autoencoder.pt").read_bytes())

    def train(folder, until):
        denoiser.train(folder, kept, pool, 10, until, "cpu")

    at_once, after_a_stop = goes_on(train, tmp_path, "denoiser.pt")
    assert at_once == after_a_stop


def test_few_poses_are_the_first_of_each_concept_and_colour():
    concept, colour = np.repeat([0, 1], 6), np.tile([-1, -1, -1, -1, 4, 4], 2)
    plain, coloured = np.flatnonzero(colour < 0), np.flatnonzero(colour >= 0)
    few = denoiser.in_few_poses(denoiser.Latents(torch.zeros(12), concept, colour, plain, coloured))
    assert few.plain.tolist() == [0, 1, 6, 7]
    assert few.coloured.tolist() == [4, 10]


def test_a_finished_training_does_nothing_more(kept, pool, work):
    before = (work / "denoiser.pt").stat().st_mtime_ns
    assert np.isnan(denoiser.train(work, kept, pool, 10, 2, "cpu"))
    assert (work / "denoiser.pt").stat().st_mtime_ns == before


def test_latents_of_an_earlier_autoencoder_are_not_learnt_from(tmp_path):
    for second, name in enumerate(("latents.pt", "autoencoder.pt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (second, second))
    denoiser.forget_stale_latents(tmp_path)
    assert not (tmp_path / "latents.pt").exists()


def test_a_denoiser_that_learnt_from_an_earlier_autoencoder_is_not_trained_on(tmp_path):
    for second, name in enumerate(("latents.pt", "denoiser.pt", "autoencoder.pt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (second, second))
    with pytest.raises(ValueError, match=r"remove denoiser\.pt"):
        denoiser.forget_stale_latents(tmp_path)


def test_the_folder_exported_loads_as_it_is_and_paints_what_the_checkpoints_paint(tmp_path, kept, pool, work):
    from diffusers import StableDiffusionPipeline

    from models.train.export import assemble

    export(work, kept, pool, tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    paint = partial(_paint, prompt="a ball", num_inference_steps=3)
    assert np.abs(paint(loaded) - paint(assemble(work, kept, pool))).mean() < 1 / 255
    assert (tmp_path / "names.tsv").read_text().splitlines()[0] == "ball\t1f000"


def test_an_adapter_exported_changes_what_is_painted(tmp_path, kept, pool, work):
    from diffusers import StableDiffusionPipeline

    export(work, kept, pool, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    before = _paint(pipe, prompt="a ball", num_inference_steps=2)
    pipe.load_lora_weights(tmp_path / "loras", weight_name="night.safetensors", adapter_name="night")
    assert np.abs(_paint(pipe, prompt="a ball", num_inference_steps=2) - before).max() > 0
    pipe.set_adapters("night", 0.0)
    assert np.abs(_paint(pipe, prompt="a ball", num_inference_steps=2) - before).max() == 0


def _paint(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**options, generator=torch.Generator().manual_seed(0), output_type="np").images[0]


def test_the_tokenizer_comes_out_the_same_every_time(tmp_path, kept):
    for folder in ("a", "b"):
        make_tokenizer(kept, tmp_path / folder)
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_tokenizer_once_written_stays(tmp_path, kept):
    first = make_tokenizer(kept, tmp_path)
    again = make_tokenizer(kept[::-1][:2], tmp_path)
    assert again("a ball shape").input_ids == first("a ball shape").input_ids


def test_captions_name_the_concept_or_a_keyword_or_nothing(kept):
    drawn = [caption(kept[0], None, random.Random(i)) for i in range(400)]
    assert 20 < drawn.count("") < 65
    assert all("ball" in c or "thing" in c for c in drawn if c)
    blue = [caption(kept[0], "blue", random.Random(i)) for i in range(40)]
    assert all("blue" in c and "ball" in c for c in blue if c)


def test_the_judge_knows_each_concept_shifted_mirrored_and_smaller(kept):
    known = judge.Judge(judge.references(judge.originals(kept)))
    moved = np.stack([pictures.place(Image.open(e.picture), 0.86, 3, -4)[:, ::-1] for e in kept])
    assert known.order(moved)[:, 0].tolist() == list(range(len(kept)))
    painted = np.stack([pictures.place(pictures.colourise(Image.open(e.picture), "pink"), 1.0) for e in kept])
    assert {judge.colour_of(p, e) for p, e in zip(painted, kept, strict=True)} == {"pink"}


def test_tiles_come_back_in_their_order(tmp_path, kept):
    judge.write_tiles(tmp_path / "tiles.webp", kept)
    known = judge.Judge(judge.references(judge.read_tiles(tmp_path / "tiles.webp", len(kept)), judge.SIDE))
    pictures_of_64 = judge.references(judge.originals(kept))[0]
    assert known.order(pictures_of_64)[:, 0].tolist() == list(range(len(kept)))


def test_a_contact_sheet_has_a_row_for_every_so_many_pictures(tmp_path):
    contact_sheet(tmp_path / "sheet.png", np.zeros((5, 64, 64, 3), np.uint8), 3, [*"abcde"])
    with Image.open(tmp_path / "sheet.png") as written:
        assert written.size == (192, 150)


def test_a_package_is_unpacked_whole_whatever_an_earlier_try_left(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "words.json").write_text("[]")
    archive = tmp_path / "words.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    (tmp_path / "words.part" / "package").mkdir(parents=True)
    (tmp_path / "words.part" / "package" / "half").touch()
    sources.unpack(archive, tmp_path / "words")
    assert [file.name for file in (tmp_path / "words" / "package").iterdir()] == ["words.json"]
    assert not (tmp_path / "words.part").exists()
