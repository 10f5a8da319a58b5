"""Checkpoints of four families, as folders and as single files, in one worker whose memory holds less than half of them."""

import re
import time

import httpx2
import numpy as np
import pytest

from tests.adapters import write_adapter
from tests.checkpoints import table, write, write_single
from tests.house import house
from tests.tiny import Family

NAMES = {"sd15": "SD", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}
SINGLE = {"sd15-file": "sd15", "sdxl-file": "sdxl"}
MEMORY = 4_000_000  # bytes; all of them take 9 million


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """A models.toml of all of them, each with an adapter; sd15 has one of sdxl too."""
    import diffusers

    folder = tmp_path_factory.mktemp("checkpoints")
    tables = []
    for name, family in NAMES.items():
        source = write(family, folder / name)
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, local_files_only=True)
        adapter = write_adapter(Family(pipe, dict), folder / "loras", name, rank=2, alpha=16)
        tables += [table(name, source), f'[models.{name}.loras.own]\nsource = "{adapter}"\n']
    for name, family in SINGLE.items():
        file, config = write_single(folder / family, folder / f"{name}.safetensors", folder / f"{name}-config")
        options = {"config": f'"{config}"', "aliases": f'["{name}.SAFETENSORS"]'}
        tables.append(table(name, file, **options))
    tables.append(f'[models.sd15.loras.wrong]\nsource = "{folder}/loras/sdxl.safetensors"\n')
    (folder / "models.toml").write_text("\n".join(tables))
    return folder / "models.toml"


@pytest.fixture(scope="module")
def built(catalog, redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    settings = {"SAFELIGHT_MODELS": str(catalog), "SAFELIGHT_MODEL_MEMORY": str(MEMORY)}
    url = redis_server.url.replace("/0", "/7")
    with house(folder, url, **settings) as built:
        built.start("api")
        built.start("worker")
        built.wait_until(built.is_ready, 90)
        yield built


def test_all_checkpoints_paint_in_one_worker_that_cannot_hold_them(built):
    began = time.monotonic()
    names = [*NAMES, *SINGLE]
    jobs = {name: built.submit(model=name, seed=7) for name in names}
    pictures = {name: built.picture(built.wait(job["id"])) for name, job in jobs.items()}
    metrics = built.worker_metrics()
    print(f"{len(names)} models in {time.monotonic() - began:.1f} s, {metrics['safelight_model_loads_total']} loads")
    assert all(picture.std() > 5 for picture in pictures.values())
    assert metrics["safelight_model_evictions_total"] >= 3
    for single, folder in SINGLE.items():
        assert np.array_equal(pictures[single], pictures[folder])
