import pytest
import torch

from app.core.catalog import Defaults, ModelSpec
from app.core.params import GenerationParams

SCHEDULERS = ("ddim", "euler", "dpmpp_2m", "euler_a", "heun", "pndm")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    from worker.pipelines.tiny_model import write_tiny

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny(folder)
    return folder


def spec_of(folder, **options):
    defaults = Defaults(width=64, height=64, num_inference_steps=8, scheduler="ddim")
    return ModelSpec(**({"name": "tiny", "source": folder, "defaults": defaults, "schedulers": SCHEDULERS} | options))


@pytest.fixture(scope="session")
def model(tiny_folder):
    from worker.pipelines.load import load

    return load(spec_of(tiny_folder), "cpu")


@pytest.fixture
def engine_and_log(model):
    from tests.tiny import Log
    from worker.engine.engine import Engine

    log = Log()
    engine = Engine(model.modules, log, max_batch=64)
    yield engine, log
    engine.close()


def params_of(i=0, **options):
    asked = {
        "model": "tiny",
        "prompt": "a cat " * (1 + i % 3),
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 8 + i % 13,
        "guidance_scale": 3.0 + i % 4,
        "seed": i,
        "num_images": 1,
        "scheduler": SCHEDULERS[i % 3],
        "output_format": "png",
    }
    return GenerationParams(**(asked | options))
