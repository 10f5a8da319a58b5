import copy

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tests.tiny import build_family, together
from tests.unit.engine.toys import finish
from worker.engine.encodings import Encodings
from worker.engine.engine import Engine
from worker.engine.run import Run
from worker.engine.target import Phase, Target


class Encoder(torch.nn.Module):
    """Token ids -> the same three times; a row a text, and what it was asked for."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[list[int]] = []

    def forward(self, input_ids, attention_mask=None, past=None, *, output_hidden_states=False):
        if (input_ids == 666).any():
            raise RuntimeError("no such word")
        self.seen += input_ids.tolist()
        states = input_ids[..., None].float().repeat(1, 1, 3) * self.weight
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,) if output_hidden_states else None)


@pytest.fixture
def encoder():
    return Encoder()


@pytest.fixture
def engine(encoder):
    made = Engine({"text_encoder": Target(encoder, Phase.ENCODING)})
    yield made
    made.close()


def ask(engine, encoder, *texts, reproducible=False, **options):
    """A run for each text, all at once; what each was answered."""
    runs = [
        Run(f"r{i}", lambda _, t=text: encoder(torch.tensor([t]), **options), 0, reproducible=reproducible)
        for i, text in enumerate(texts)
    ]
    for run in runs:
        engine.add(run)
    finish(engine)
    return [run.result for run in runs]


def test_a_text_is_encoded_once_ever(engine, encoder):
    first = ask(engine, encoder, [1, 2], [3, 4], [1, 2])
    again = ask(engine, encoder, [3, 4], [1, 2])

    assert encoder.seen == [[1, 2], [3, 4]]
    assert [answer.last_hidden_state[0, 0, 0].item() for answer in first + again] == [1, 3, 1, 3, 1]
    assert all(type(answer) is BaseModelOutput for answer in first + again)


def test_another_mask_or_another_option_is_another_text(engine, encoder):
    ask(engine, encoder, [1, 2])
    ask(engine, encoder, [1, 2], attention_mask=torch.tensor([[1, 0]]))
    ask(engine, encoder, [1, 2], attention_mask=torch.tensor([[1, 1]]))
    answers = ask(engine, encoder, [1, 2], output_hidden_states=True)

    assert len(encoder.seen) == 4
    assert answers[0].hidden_states is not None


def test_what_a_pipeline_changes_in_place_is_its_own(engine, encoder):
    def spoil(_):
        states = encoder(torch.tensor([[1, 2]])).last_hidden_state
        seen = states[0, 0, 0].item()
        states.fill_(9.0)
        return seen

    for _ in range(3):
        runs = [Run(f"r{i}", spoil, 0) for i in range(2)]
        for run in runs:
            engine.add(run)
        finish(engine)
        assert [run.result for run in runs] == [1.0, 1.0]

    assert len(encoder.seen) == 1


def test_a_call_with_a_thing_that_cannot_be_compared_is_computed(engine, encoder):
    for _ in range(2):
        ask(engine, encoder, [1, 2], past=object())

    assert len(encoder.seen) == 2


def test_a_text_that_cannot_be_encoded_is_not_kept_and_fails_those_who_sent_it(engine, encoder):
    for _ in range(2):
        runs = [Run(f"r{t}", lambda _, t=t: encoder(torch.tensor([[t]])), 0) for t in (5, 666)]
        for run in runs:
            engine.add(run)
        finish(engine)
        assert runs[0].error is None
        assert runs[1].error is not None


def test_a_reproducible_run_takes_no_encoding_made_in_company(engine, encoder):
    ask(engine, encoder, [1, 2], [3, 4])
    ask(engine, encoder, [1, 2], [3, 4], reproducible=True)
    ask(engine, encoder, [1, 2], reproducible=True)

    assert encoder.seen == [[1, 2], [3, 4], [1, 2], [3, 4]]


def test_the_least_recently_used_go_first():
    kept = Encodings(most_bytes=3 * 4)
    for key in "abc":
        kept.put(key, torch.ones(1))
    kept.get("a")
    kept.put("d", torch.ones(1))

    assert kept.get("b") is None
    assert all(kept.get(key) is not None for key in "acd")
    assert kept.bytes == 12


def test_what_is_larger_than_all_room_is_not_kept():
    kept = Encodings(most_bytes=4)
    kept.put("a", (torch.ones(2),))

    assert kept.get("a") is None
    assert kept.bytes == 0


def test_the_empty_negative_prompt_of_real_pipelines_is_encoded_once():
    family = build_family("SD")
    log = together(family, [family.run(i) for i in range(12)], [i // 2 for i in range(12)])

    texts = {family.request(i)["prompt"] for i in range(12)} | {"", "dog"}
    assert sum(entry[1] for entry in log.of("text_encoder")) == len(texts)


def test_an_image_is_never_kept():
    family = build_family("SD img2img")
    runs = [family.run(0), copy.copy(family.run(0))]
    runs[1].id = "again"
    log = together(family, runs, [0, 1])

    assert sum(entry[1] for entry in log.of("vae.encode")) == 2
