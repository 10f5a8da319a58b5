import gc
import inspect
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from app.core.errors import GenerationFailed, InvalidOutput
from tests.tiny import build_family, together
from tests.unit.pipelines.conftest import SCHEDULERS, params_of, spec_of
from worker.engine.run import Aborted, Run
from worker.pipelines import schedulers
from worker.pipelines.own import own
from worker.pipelines.tasks import runs_for, to_picture, warm_up


@pytest.fixture(scope="module")
def flow_family():
    return build_family("SD3")


def alone(model, params):
    [run] = runs_for(model, params, "alone")
    return run.body(run)


def finish(engine):
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    return finished


def test_24_mixed_jobs_share_forwards_and_each_picture_is_its_own(model, engine_and_log):
    engine, log = engine_and_log
    runs = [run for i in range(24) for run in runs_for(model, params_of(i), f"job-{i}")]
    for run in runs:
        engine.add(run)
    finish(engine)

    forwards = log.of("unet")
    shared = sum(entry[2] for entry in forwards) / len(forwards)
    print(f"{shared:.1f} runs a forward")
    assert shared >= 8
    pictures = [run.result.astype(int) for run in runs]
    for i, made in enumerate(pictures):
        assert np.abs(made - alone(model, params_of(i))).max() <= 1
    assert min(np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]) > 8


def test_a_short_job_submitted_while_a_200_step_job_runs_ends_first(model, engine_and_log):
    engine, _ = engine_and_log
    [long] = runs_for(model, params_of(num_inference_steps=200), "long")
    [short] = runs_for(model, params_of(num_inference_steps=4), "short")
    engine.add(long)
    while long.step < 20:
        engine.step()
    engine.add(short)
    while not short.is_finished:
        engine.step()

    assert short.error is None
    assert 20 < long.step < 40


def test_a_cancelled_job_leaves_within_a_step(model, engine_and_log):
    engine, log = engine_and_log
    runs = [run for i in range(3) for run in runs_for(model, params_of(num_inference_steps=10), f"job-{i}")]
    for run in runs:
        engine.add(run)
    while runs[1].step < 2:
        engine.step()
    engine.abort("job-1/0")
    log.forwards.clear()
    finish(engine)

    assert isinstance(runs[1].error, Aborted)
    assert max(entry[2] for entry in log.forwards) == 2
    assert np.array_equal(runs[0].result, runs[2].result)


def test_a_job_of_n_images_is_n_runs_each_of_its_own_seed(model, engine_and_log):
    engine, _ = engine_and_log
    runs = runs_for(model, params_of(num_images=3, seed=41), "job")
    for run in runs:
        engine.add(run)
    finish(engine)

    assert [run.id for run in runs] == ["job/0", "job/1", "job/2"]
    assert np.abs(runs[2].result.astype(int) - alone(model, params_of(seed=43))).max() <= 1
    assert np.abs(runs[2].result.astype(int) - runs[1].result).mean() > 8


def test_a_picture_is_bytes_of_the_asked_size(model, engine_and_log):
    engine, _ = engine_and_log
    [run] = runs_for(model, params_of(width=96, height=64), "job")
    engine.add(run)
    finish(engine)

    assert run.result.shape == (64, 96, 3)
    assert run.result.dtype == np.uint8


@pytest.mark.parametrize(
    "name", [name for name, kind in schedulers.KINDS.items() if not kind.is_flow and not kind.is_video]
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_progress_counts_the_timesteps_a_scheduler_really_takes(model, engine_and_log, name, steps):
    engine, log = engine_and_log
    [run] = runs_for(model, params_of(scheduler=name, num_inference_steps=steps), "job")
    promised = run.steps
    engine.add(run)
    finish(engine)

    assert run.error is None
    assert run.step == run.steps == promised == len(log.of("unet"))


@pytest.mark.parametrize("name", [name for name, kind in schedulers.KINDS.items() if kind.is_flow])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_progress_counts_the_timesteps_a_flow_scheduler_really_takes(flow_family, name, steps):
    run = Run("job", partial(flow_family.make, 0, scheduler=name, num_inference_steps=steps), steps)
    log = together(flow_family, [run], [0])

    assert run.error is None
    assert run.step == run.steps == schedulers.KINDS[name].taken(steps) == len(log.of("transformer"))
    assert run.result.isfinite().all()


def test_a_pipeline_that_knows_only_the_old_callback_tells_its_progress_too():
    family = build_family("PixArt")
    run = family.run(3)
    together(family, [run], [0])

    assert run.step == run.steps == family.request(3)["num_inference_steps"]


def test_the_phases_of_a_run_are_encoding_denoising_decoding(model, engine_and_log):
    engine, _ = engine_and_log
    [run] = runs_for(model, params_of(), "job")
    engine.add(run)
    phases = [run.phase]
    while not engine.is_idle:
        engine.step()
        if run.phase != phases[-1]:
            phases.append(run.phase)

    assert phases == ["queued", "encoding", "denoising", "decoding"]


def test_a_picture_that_is_not_numbers_fails_its_own_run_alone(model, engine_and_log):
    engine, _ = engine_and_log
    runs = [run for i in range(3) for run in runs_for(model, params_of(i), f"job-{i}")]
    for run in runs:
        engine.add(run)
    spoilt = []

    def spoil(module, args):
        if not spoilt:
            spoilt.append(args[0].fill_(torch.nan))  # what the first run hands to the forward it shares

    hook = model.pipe.unet.register_forward_pre_hook(spoil)
    finish(engine)
    hook.remove()

    assert [type(run.error) for run in runs] == [InvalidOutput, type(None), type(None)]


def test_arguments_the_pipeline_refuses_fail_the_run(model, engine_and_log):
    engine, _ = engine_and_log
    [run] = runs_for(model, params_of(width=65), "job")
    engine.add(run)

    assert engine.step() == [run]
    assert isinstance(run.error, GenerationFailed)


def test_warming_up_makes_a_picture_and_measures_every_module(model):
    from worker.engine.engine import Engine

    engine = Engine(model.modules)
    warm_up(model, engine)
    engine.close()

    assert {name for name, _ in engine.batcher.curves} == {"text_encoder", "unet", "vae.decode"}
    assert engine.is_idle


def test_a_finished_runs_latents_are_free_without_a_garbage_collection(model):
    [run] = runs_for(model, params_of(), "job")
    gc.disable()
    try:
        run.body(run)
        assert run.sketch()
        scheduler = weakref.ref(inspect.getclosurevars(run.sketch).nonlocals["scheduler"])
        del run
        assert scheduler() is None
    finally:
        gc.enable()


def test_every_run_has_a_noise_scheduler_of_its_own(model):
    made = [schedulers.make("euler", model.pipe.scheduler.config) for _ in range(2)]

    assert made[0] is not made[1]
    assert made[0].config.beta_end == model.pipe.scheduler.config.beta_end


def test_numbers_become_bytes_by_rounding():
    assert to_picture(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]


def test_the_catalogs_schedulers_are_all_known():
    assert set(SCHEDULERS) <= schedulers.KINDS.keys()
    assert spec_of("x").schedulers == SCHEDULERS


def test_a_runs_own_pipeline_is_of_its_kind_knows_its_device_and_shares_the_modules(model):
    copied = own(model.pipe, model.device)
    copied.scheduler = None

    assert isinstance(copied, type(model.pipe))
    assert type(copied).__name__ == type(model.pipe).__name__
    assert copied.unet is model.pipe.unet
    assert model.pipe.scheduler is not None
    assert (copied.device, copied._execution_device) == (model.pipe.device, model.pipe._execution_device)
    other = torch.device("meta")
    assert (own(model.pipe, other)._execution_device, copied._execution_device) == (other, model.device)
