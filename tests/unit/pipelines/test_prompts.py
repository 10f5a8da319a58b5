"""Long and weighted prompts, on real text encoders with tiny weights."""

import numpy as np
import pytest
import torch

from app.core.catalog import Defaults, ModelSpec
from app.core.errors import ConfigError, PromptTooLong
from app.core.params import GenerationParams
from tests.checkpoints import BUILDERS
from tests.tiny import together
from worker.pipelines.load import warm
from worker.pipelines.prompts import can_weigh, fits, with_prompts
from worker.pipelines.tasks import runs_for
from worker.pipelines.tiny_model import build

CPU = torch.device("cpu")
LONG = "a red lamp on a wooden table, " * 8  # a letter is a token of the tiny tokenizer
WEIGHTED = "a (red:1.5) lamp [on] a (table:0.4)"


def asked(prompt, **options):
    given = {
        "model": "m",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "seed": 1,
        "num_images": 1,
        "scheduler": "ddim",
        "output_format": "png",
    }
    return GenerationParams(prompt=prompt, **given | options)


def spec(**options):
    defaults = Defaults(width=64, height=64, scheduler="ddim")
    return ModelSpec(name="m", source="m", defaults=defaults, schedulers=("ddim",), **options)


@pytest.fixture(scope="module")
def pipes():
    return {"sd": build()} | {name: BUILDERS[name]() for name in ("SDXL", "SD3", "Flux")}


def embeddings(pipe, params):
    with torch.inference_mode():
        found = with_prompts({"prompt": params.prompt, "negative_prompt": params.negative_prompt}, pipe, params)
    assert not {"prompt", "negative_prompt"} & found.keys()
    return found


@pytest.mark.parametrize("name", ["sd", "SDXL"])
def test_a_weighted_prompt_whose_words_all_count_1_is_what_the_pipeline_encodes_itself(pipes, name):
    pipe = pipes[name]
    found = embeddings(pipe, asked("a lamp", negative_prompt="dim", prompt_weighting=True))
    with torch.inference_mode():
        own = pipe.encode_prompt(
            "a lamp", negative_prompt="dim", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name_of, tensor in zip(names, own, strict=False):
        assert torch.allclose(found[name_of], tensor, atol=1e-5), name_of


@pytest.mark.parametrize("name", ["sd", "SDXL"])
def test_a_long_prompt_is_read_to_its_end(pipes, name):
    pipe = pipes[name]
    assert not fits(pipe, LONG)
    found = embeddings(pipe, asked(LONG))
    other = embeddings(pipe, asked(LONG + "blue"))
    assert found["prompt_embeds"].shape[1] == 3 * 77 == found["negative_prompt_embeds"].shape[1]
    assert torch.equal(found["prompt_embeds"][:, :77], other["prompt_embeds"][:, :77])
    assert not torch.equal(found["prompt_embeds"], other["prompt_embeds"])


def test_weights_move_the_picture_and_the_more_the_further(pipes):
    model = warm(spec(), pipes["sd"], CPU, torch.float32)
    with torch.inference_mode():
        plain, *weighted = (
            runs_for(model, asked(f"a (red:{weight}) lamp", prompt_weighting=True), "j")[0]
            for weight in (1, 1.2, 2, 0.4)
        )
        pictures = [run.body(run).astype(int) for run in (plain, *weighted)]
    distances = [np.abs(picture - pictures[0]).mean() for picture in pictures[1:]]
    assert 0 < distances[0] < distances[1]
    assert distances[2] > 0


def test_parentheses_are_text_unless_weighting_is_asked_for(pipes):
    given = {"prompt": "a (red:1.5) lamp", "negative_prompt": ""}
    assert with_prompts(given, pipes["sd"], asked("a (red:1.5) lamp")) == given


def test_company_is_alone_and_what_was_encoded_is_kept(pipes):
    model = warm(spec(), pipes["sd"], CPU, torch.float32)
    prompts = [(LONG, False), (WEIGHTED, True), ("a lamp", False), (LONG, False), (WEIGHTED, True), ("a (lamp)", True)]
    crowd = [
        runs_for(model, asked(p, prompt_weighting=w, seed=i, num_inference_steps=3 + i % 3), f"j{i}")[0]
        for i, (p, w) in enumerate(prompts)
    ]
    family = type("Family", (), {"pipe": model.pipe})
    log = together(family, crowd, [0, 0, 1, 2, 2, 3], targets=model.modules)
    assert all(run.error is None for run in crowd), [run.error for run in crowd]
    with torch.inference_mode():
        for i, (prompt, weighted) in enumerate(prompts):
            params = asked(prompt, prompt_weighting=weighted, seed=i, num_inference_steps=3 + i % 3)
            [run] = runs_for(model, params, "alone")
            assert np.abs(run.body(run).astype(int) - crowd[i].result).max() <= 1
    encoder = log.of("text_encoder")
    assert max(runs for _, _, runs, _ in encoder) > 1, "nothing was encoded together"
    # Of the long prompt three pieces and the empty one, of the weighted one itself, and without each of two words, ...
    assert sum(rows for _, rows, _, _ in encoder) <= 14


def test_a_reproducible_runs_bits_are_its_own(pipes):
    model = warm(spec(), pipes["sd"], CPU, torch.float32)
    params = asked(WEIGHTED, prompt_weighting=True, reproducible=True)
    family = type("Family", (), {"pipe": model.pipe})
    [alone] = runs_for(model, params, "alone")
    together(family, [alone], [0], targets=model.modules)
    crowd = [runs_for(model, asked(f"{WEIGHTED} {i}", prompt_weighting=True), f"c{i}")[0] for i in range(3)]
    [among] = runs_for(model, params, "among")
    together(family, [*crowd, among], [0, 0, 0, 0], targets=model.modules)
    assert (alone.result == among.result).all()


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_what_no_encoder_reads_to_its_end_is_refused_by_name(pipes, name):
    pipe = pipes[name]
    assert not can_weigh(pipe)
    assert fits(pipe, "a lamp " * 20), "T5 reads more than CLIP"
    with pytest.raises(PromptTooLong, match="tokens and no more"):
        with_prompts({"prompt": ""}, pipe, asked("lamp " * 600))


@pytest.mark.parametrize("options", [{}, {"prompt_weighting": True}])
def test_a_model_may_leave_long_prompts_out(pipes, options):
    params = asked(LONG, **options)
    with pytest.raises(PromptTooLong, match="77 tokens"):
        with_prompts({"prompt": LONG}, pipes["sd"], params, in_pieces=False)


def test_a_model_that_cannot_weigh_words_does_not_say_that_it_can(pipes):
    defaults = Defaults(width=32, height=32, scheduler="flow_euler")
    flux = ModelSpec(
        name="m",
        source="m",
        defaults=defaults,
        schedulers=("flow_euler",),
        accepts=("guidance_scale", "prompt_weighting"),
    )
    with pytest.raises(ConfigError, match="no use for prompt_weighting"):
        warm(flux, pipes["Flux"], CPU, torch.float32)
