"""Safety checkers with tiny weights: real classes of transformers and diffusers, loaded from folders."""

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor

from app.core.catalog import SafetySpec
from app.core.errors import ConfigError, ContentRefused
from tests.checkers import BLUE, RED, plain, write_classifier
from worker.safety import blurred, judged, open_checker


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder = tmp_path_factory.mktemp("concepts")
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "intermediate_size": 8, "projection_dim": 8}, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        checker = StableDiffusionSafetyChecker(config).eval()
        for parameter in checker.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # as they come, they tell no picture from another
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        checker.special_care_embeds_weights.fill_(2)
        checker.concept_embeds_weights.fill_(2)
        inputs = processor(images=[plain(RED), plain(BLUE)], return_tensors="pt").pixel_values
        red, blue = checker.visual_projection(checker.vision_model(inputs)[1])
        checker.concept_embeds[3] = red
        checker.concept_embeds_weights[3] = (1 + torch.cosine_similarity(red, blue, dim=0)) / 2
    checker.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_classifier_flags_by_label_and_threshold(classifier):
    checker = open_checker(SafetySpec(source=classifier, labels=("red",), threshold=0.9))
    red, blue = checker.look(plain(RED)), checker.look(plain(BLUE))
    assert (red.flagged, blue.flagged) == (True, False)
    assert red.scores["red"] > 0.9
    assert blue.scores["red"] < 0.1
    assert sum(red.scores.values()) == pytest.approx(1, abs=1e-3)
    assert not open_checker(SafetySpec(source=classifier, labels=("red",), threshold=1)).look(plain(RED)).flagged


def test_stable_diffusions_own_checker_says_how_near_a_concept_is(concepts):
    checker = open_checker(SafetySpec(source=concepts))
    red, blue = checker.look(plain(RED)), checker.look(plain(BLUE))
    assert (red.flagged, blue.flagged) == (True, False)
    assert red.scores["concept"] > 0 > blue.scores["concept"]


def test_policies_flag_blur_or_refuse_what_is_flagged_and_nothing_else(classifier):
    half = np.concatenate([plain(RED), np.roll(plain(RED), 1)], 1)
    half[::2] //= 2
    for policy in ("flag", "blur", "refuse"):
        checker = open_checker(SafetySpec(source=classifier, policy=policy, labels=("red",), threshold=0.2))
        picture, safety = judged(checker, plain(BLUE))
        assert (picture == plain(BLUE)).all()
        assert (safety.flagged, safety.blurred) == (False, False)
    flag, blur, refuse = (
        open_checker(SafetySpec(source=classifier, policy=policy, labels=("red",), threshold=1e-6))
        for policy in ("flag", "blur", "refuse")
    )
    assert (judged(flag, half)[0] == half).all()
    picture, safety = judged(blur, half)
    assert safety.blurred
    assert np.abs(np.diff(picture.astype(int), axis=0)).max() <= 2 < np.abs(np.diff(half.astype(int), axis=0)).max()
    with pytest.raises(ContentRefused):
        judged(refuse, half)
    assert judged(None, half) == (half, None)


def test_nothing_small_is_left_in_a_blurred_picture():
    noise = np.random.RandomState(1).randint(0, 255, (64, 96, 3), dtype=np.uint8)
    assert np.asarray(blurred(noise)).std() < noise.std() / 5


@pytest.mark.parametrize("labels", [(), ("nothing",)])
def test_labels_must_be_the_classifiers_own(classifier, labels):
    with pytest.raises(ConfigError, match="calm, red"):
        open_checker(SafetySpec(source=classifier, labels=labels))


def test_a_folder_that_is_no_checker_or_could_run_code_is_refused(classifier, concepts, tmp_path):
    with pytest.raises(ConfigError, match="leave labels out"):
        open_checker(SafetySpec(source=concepts, labels=("x",)))
    with pytest.raises(ConfigError):
        open_checker(SafetySpec(source=tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    with pytest.raises(ConfigError, match="neither"):
        open_checker(SafetySpec(source=tmp_path))
    (tmp_path / "model.bin").write_bytes(b"\x80\x02pickle")
    with pytest.raises(ConfigError, match=r"model\.bin"):
        open_checker(SafetySpec(source=tmp_path))
