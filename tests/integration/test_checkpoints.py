"""Checkpoints of four families, as folders and as single files, in one worker that cannot hold half of them."""

import pickle
import threading
import time

import numpy as np
import pytest
import torch

from tests.adapters import write_adapter
from tests.checkpoints import table, write, write_single
from tests.house import STARTING, house
from tests.tiny import Family

NAMES = {"sd15": "SD", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}
SINGLE = {"sd15-file": "sd15", "sdxl-file": "sdxl"}
MEMORY = 4_000_000  # bytes; all of them take 9 million


pytestmark = pytest.mark.timeout(400)


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
    (folder / "poisoned").mkdir()
    (folder / "poisoned" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "poisoned" / "weights.bin").write_bytes(pickle.dumps(print))
    tables.append(table("poisoned", folder / "poisoned"))
    tables.append(table("flux-oil", folder / "flux", prompt_template='"{prompt}, oil"'))
    tables.append(f'[models.sd15.loras.wrong]\nsource = "{folder}/loras/sdxl.safetensors"\n')
    (folder / "models.toml").write_text("\n".join(tables))
    return folder / "models.toml"


@pytest.fixture(scope="module")
def built(catalog, redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    settings = {
        "SAFELIGHT_MODELS": str(catalog),
        "SAFELIGHT_MODEL_MEMORY": str(MEMORY),
        "SAFELIGHT_MAX_BATCH": "2",  # measures fewer sizes of a batch at the start
    }
    url = redis_server.url.replace("/0", "/7")
    with house(folder, url, **settings) as built:
        built.start("api")
        built.start("worker")
        built.wait_until(built.is_ready, 2 * STARTING)
        yield built


def painted(built, **request):
    return built.picture(built.wait(built.submit(seed=7, **request)["id"]))


@pytest.fixture(scope="module")
def pictures(built):
    """One of each, made at once."""
    jobs = {name: built.submit(model=name, seed=7) for name in (*NAMES, *SINGLE)}
    return {name: built.picture(built.wait(job["id"])) for name, job in jobs.items()}


def test_all_checkpoints_paint_in_one_worker_that_cannot_hold_them(built, pictures):
    metrics = built.worker_metrics()
    loads, evictions = (metrics[f"safelight_model_{name}_total"] for name in ("loads", "evictions"))
    print(f"{len(pictures)} models, {loads:.0f} loads, {evictions:.0f} evictions")
    assert all(picture.std() > 5 for picture in pictures.values())
    assert evictions >= 3


@pytest.mark.parametrize(("single", "folder"), SINGLE.items())
def test_a_single_file_paints_what_the_folder_of_its_weights_paints(pictures, single, folder):
    assert np.array_equal(pictures[single], pictures[folder])


def test_an_adapter_of_each_family_changes_the_picture(built, pictures):
    jobs = {name: built.submit(model=name, seed=7, loras=[{"name": "own"}]) for name in NAMES}
    for name, job in jobs.items():
        changed = built.picture(built.wait(job["id"])).astype(int) - pictures[name]
        print(f"{name}: mean change {abs(changed).mean():.2f} of 255")
        assert abs(changed).mean() > 0.2


def test_an_adapter_of_another_base_model_is_refused_at_submit(built):
    reply = built.client.post("/v1/jobs", json={"model": "sd15", "prompt": "a lamp", "loras": [{"name": "wrong"}]})

    assert reply.status_code == 422
    assert reply.json()["code"] == "invalid_params"
    assert "'wrong' is not of model 'sd15'" in reply.json()["detail"]


def test_an_alias_means_the_model_and_the_list_says_what_is_warm(built, pictures):
    assert built.submit(model="sdxl-file.SAFETENSORS")["model"] == "sdxl-file"
    built.wait_until(
        lambda: "sdxl-file" in [m["id"] for m in built.client.get("/v1/models").json()["data"] if m["warm"]], 20
    )

    listed = {model["id"]: model for model in built.client.get("/v1/models").json()["data"]}
    assert all(model["served"] for model in listed.values())
    assert not all(model["warm"] for model in listed.values())
    assert listed["sd15"]["loras"] == ["own"]


def test_a_poisoned_model_fails_its_jobs_and_the_worker_goes_on(built, pictures):
    job = built.wait(built.submit(model="poisoned")["id"], 100, status="failed")

    assert job["error"]["code"] == "model_unavailable"
    assert "could run code" in (built.folder / "worker-1.log").read_text()
    assert np.array_equal(painted(built, model="sd15"), pictures["sd15"])


def test_a_template_wraps_the_prompt_and_the_params_keep_the_callers_words(built, pictures):
    plain = built.wait(built.submit(model="flux", prompt="a lamp at night, oil", seed=7)["id"])
    wrapped = built.wait(built.submit(model="flux-oil", prompt="a lamp at night", seed=7)["id"])

    assert wrapped["params"]["prompt"] == "a lamp at night"
    assert np.array_equal(built.picture(wrapped), built.picture(plain))


def test_steps_of_another_model_go_on_while_one_loads(catalog):
    from app.core.catalog import load_catalog
    from app.core.metrics import WorkerMetrics
    from app.core.params import GenerationRequest, complete
    from worker.engine.engine import Engine
    from worker.pipelines.load import load
    from worker.pipelines.tasks import runs_for
    from worker.warm import Keeper, Memory

    models = load_catalog(catalog)
    engine, memory = Engine({}, max_batch=8), Memory(10_000_000)
    specs = [models.get("sd15"), models.get("sdxl")]
    sizes = {"sd15": 1_000_000, "sdxl": 9_500_000}  # of which the second is not loaded at the start
    loads = []

    def loaded(spec):
        loads.append(threading.current_thread().name)
        return load(spec, "cpu")

    keeper = Keeper(
        specs, loaded, engine, WorkerMetrics(), device=torch.device("cpu"), memory=memory, size=lambda s: sizes[s.name]
    )
    keeper.start()
    keeper.places["sdxl"].bytes = 3_000_000
    params = complete(GenerationRequest(model="sd15", prompt="a lamp", seed=1, num_inference_steps=250), models)

    def steps(until):
        """Seconds from one step's end to the next, until so."""
        ends = [time.perf_counter()]
        while not until():
            while len(engine.runs) < 4:
                [run] = runs_for(keeper.model("sd15"), params, f"job-{time.perf_counter()}")
                engine.add(run)
            engine.step()
            ends.append(time.perf_counter())
        return np.diff(ends)

    quiet = iter(range(150))
    before = steps(lambda: next(quiet, None) is None)[30:]
    keeper.enter("sdxl")
    began = time.perf_counter()
    during = steps(lambda: any(found.model for found in keeper.turn()))
    seconds = time.perf_counter() - began
    engine.close()
    keeper.close()

    def told(gaps):
        p50, p90, p99 = (1000 * np.quantile(gaps, q) for q in (0.5, 0.9, 0.99))
        return f"n={len(gaps)} p50 {p50:.1f} p90 {p90:.1f} p99 {p99:.1f} longest {1000 * gaps.max():.1f} ms"

    print(f"steps before: {told(before)}\nsteps while sdxl loads ({seconds:.2f} s): {told(during)}")
    assert set(loads) == {"load_0"}
    assert len(during) >= 5
    assert during.max() < seconds / 2
