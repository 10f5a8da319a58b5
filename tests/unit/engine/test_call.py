import copy
import dataclasses
from collections import OrderedDict

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine.toys import Toy
from worker.engine.call import TEXT_TOKENS, Rows, fingerprint, join, merge, park, part, split
from worker.engine.run import Run
from worker.engine.target import Phase, Target

TOY = Target(Toy(), Phase.DENOISING, ignored=frozenset({"generator"}))


def call(**kwargs):
    return park(Run("r", print, 1), "toy", TOY, kwargs)


def sample(rows=2, *, value=0.0, width=3):
    return torch.full((rows, width), value)


def test_a_single_timestep_becomes_one_for_each_row_in_float32():
    parked = call(sample=sample(3), timestep=torch.tensor(981))

    assert parked.kwargs["timestep"].tolist() == [981.0] * 3
    assert parked.kwargs["timestep"].dtype is torch.float32


def test_calls_of_integer_and_of_float_timesteps_share_a_forward():
    a = call(sample=sample(), timestep=torch.tensor(981))
    b = call(sample=sample(), timestep=torch.tensor(12.5))
    c = call(sample=sample(), timestep=torch.tensor([7, 7]))

    assert a.key == b.key == c.key
    assert merge([a, b, c])["timestep"].tolist() == [981, 981, 12.5, 12.5, 7, 7]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"scale": 1.0}, {"scale": 2.0}),
        ({"scale": 1}, {"scale": True}),
        ({"extra": None}, {"extra": torch.zeros(2, 3)}),
        ({"extra": torch.zeros(2, 3)}, {"extra": torch.zeros(2, 4)}),
        ({"extra": torch.zeros(2, 3)}, {"extra": torch.zeros(2, 3, dtype=torch.float16)}),
        ({"positions": torch.zeros(7, 3)}, {"positions": torch.ones(7, 3)}),
        ({"img_ids": torch.zeros(2, 3)}, {"img_ids": torch.ones(2, 3)}),
        ({"options": {"scale": 1.0}}, {"options": {"scale": 0.5}}),
        ({"options": {"scale": 1.0}}, {"options": {}}),
        ({"residuals": [torch.zeros(2, 3)]}, {"residuals": [torch.zeros(2, 3)] * 3}),
        ({"img_shapes": [[(1, 4, 4)]] * 2}, {"img_shapes": [[(1, 2, 8)]] * 2}),
        ({"cache": object()}, {"cache": object()}),
    ],
)
def test_calls_that_differ_in_what_is_not_per_row_do_not_share_a_forward(a, b):
    assert call(sample=sample(), **a).key != call(sample=sample(), **b).key


@pytest.mark.parametrize(
    "shared",
    [
        {"scale": 1.0, "return_dict": False, "nothing": None},
        {"positions": torch.arange(7.0)},
        {"img_ids": torch.arange(6.0).view(2, 3)},
        {"freqs": torch.polar(torch.ones(5), torch.arange(5.0))},
        {"options": {"a": 1, "b": torch.zeros(2)}},
        {"residuals": (torch.zeros(2, 3), torch.zeros(2, 9))},
        {"img_shapes": [[(1, 4, 4)]] * 2},
    ],
)
def test_calls_of_equal_shared_arguments_share_a_forward_though_they_are_other_objects(shared):
    again = copy.deepcopy(shared)

    assert call(sample=sample(), **shared).key == call(sample=sample(value=1.0), **again).key


def test_an_ignored_argument_keeps_no_calls_apart():
    a = call(sample=sample(), generator=torch.Generator())
    b = call(sample=sample(), generator=torch.Generator())

    assert a.key == b.key
    assert "generator" not in merge([a, b])


def test_calls_of_other_row_counts_share_a_forward():
    a, b = call(sample=sample(1)), call(sample=sample(2, value=1.0))

    assert a.key == b.key
    assert merge([a, b])["sample"][:, 0].tolist() == [0, 1, 1]


def test_a_list_of_one_tensor_a_row_is_joined_and_one_of_a_tensor_a_layer_is_not():
    listed = [call(sample=[torch.zeros(4, 5), torch.ones(4, 5)]) for _ in range(2)]
    layered = [call(sample=sample(), residuals=[sample(), sample(width=7)]) for _ in range(2)]

    assert len(merge(listed)["sample"]) == 4
    assert [tuple(r.shape) for r in merge(layered)["residuals"]] == [(4, 3), (4, 7)]


def words(tokens, rows=1, value=1.0):
    return torch.full((rows, tokens, 3), value)


def test_texts_of_other_lengths_share_a_forward_where_they_may_be_filled_up():
    target = Target(Toy(), Phase.DENOISING, padded=("words", "mask"))
    seen = torch.tensor([[True] * 3 + [False] * 2])
    calls = [
        park(Run("r", print, 1), "toy", target, {"sample": sample(1), "words": words(n), "mask": mask})
        for n, mask in ((7, None), (5, seen), (TEXT_TOKENS, None))
    ]

    assert len({parked.key for parked in calls}) == 1
    merged = merge(calls)
    assert merged["words"].shape == (3, TEXT_TOKENS, 3)
    assert merged["mask"].sum(1).tolist() == [7, 3, TEXT_TOKENS]
    assert merged["words"].sum(2)[0].tolist() == [3.0] * 7 + [0.0] * (TEXT_TOKENS - 7)


def test_a_longer_text_is_filled_up_to_the_next_length():
    target = Target(Toy(), Phase.DENOISING, padded=("words", "mask"))
    parked = park(Run("r", print, 1), "toy", target, {"sample": sample(1), "words": words(TEXT_TOKENS + 1)})

    assert parked.kwargs["words"].shape[1] == 2 * TEXT_TOKENS


def test_lists_that_a_model_pads_itself_share_a_forward_unless_the_bits_must_stay():
    target = Target(Toy(), Phase.DENOISING, ragged=frozenset({"texts"}))

    def listed(tokens, *, reproducible=False):
        run = Run("r", print, 1, reproducible=reproducible)
        return park(run, "toy", target, {"sample": [torch.zeros(4)], "texts": [torch.zeros(tokens, 3)]})

    assert listed(5).key == listed(9).key
    assert [len(t) for t in merge([listed(5), listed(9)])["texts"]] == [5, 9]
    assert listed(5, reproducible=True).key != listed(9, reproducible=True).key


def test_merged_containers_are_new_ones_because_models_pop_from_them():
    options = {"ip": 1}
    parked = call(sample=sample(), options=options)
    merge([parked])["options"].pop("ip")

    assert options == {"ip": 1}


def test_padding_repeats_the_last_row():
    a = call(sample=torch.tensor([[1.0, 1], [2, 2]]), img_shapes=[[1], [2]])

    merged = merge([a], padding=2)

    assert merged["sample"][:, 0].tolist() == [1, 2, 2, 2]
    assert merged["img_shapes"] == [[1], [2], [2], [2]]


def test_the_rows_of_a_call_are_those_of_its_sample():
    assert call(timestep=torch.ones(1), sample=sample(3)).rows == 3
    assert call(scale=1).rows == 1


def test_results_keep_their_type():
    @dataclasses.dataclass
    class Odd:
        values: torch.Tensor

    rows = torch.arange(3.0).view(3, 1)
    outputs = [
        rows,
        (rows,),
        [rows, rows],
        OrderedDict(a=rows),
        UNet2DConditionOutput(sample=rows),
        DiagonalGaussianDistribution(torch.zeros(3, 2, 1, 1)),
        Odd(rows),
        "text",
        None,
        torch.tensor(5.0),
    ]
    for output in outputs:
        first, second = split(output, [1, 2])
        assert type(first) is type(second) is type(output)
    assert split(outputs[4], [1, 2])[1].sample.tolist() == [[1], [2]]
    assert split(outputs[5], [1, 2])[1].mean.shape[0] == 2


def test_a_list_of_one_result_a_row_is_cut():
    parts = split(([torch.zeros(2, n) for n in range(3)],), [1, 2])

    assert [[tuple(t.shape) for t in part[0]] for part in parts] == [[(2, 0)], [(2, 1), (2, 2)]]


def test_a_tensor_is_read_once_and_tensors_of_equal_bits_are_equal():
    a, b = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)

    assert fingerprint(a) is fingerprint(a)
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a) != fingerprint(torch.ones(3))
    assert fingerprint(torch.tensor(True)) != fingerprint(torch.tensor(False))


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
trees = st.recursive(
    shapes | st.integers() | st.none() | st.text(max_size=3),
    lambda inner: (
        st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def grow(tree, rows, seed):
    """The tree with a tensor of random rows for each tuple of sizes; such a tensor differs from call to call."""
    if isinstance(tree, dict):
        return {k: grow(v, rows, seed) for k, v in tree.items()}
    if isinstance(tree, tuple) and tree and all(isinstance(n, int) and 0 < n < 4 for n in tree):
        return torch.randn(rows, *tree, generator=torch.Generator().manual_seed(seed))
    return tuple(grow(v, rows, seed) for v in tree) if isinstance(tree, tuple) else tree


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@settings(deadline=None)  # another process may hold the core
@given(trees, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 4))
def test_splitting_what_was_merged_gives_every_call_its_own_back(tree, counts, padding):
    calls = [call(sample=sample(n, value=i), tree=grow(tree, n, i)) for i, n in enumerate(counts)]
    assert len({c.key for c in calls}) == 1

    merged = merge(calls, padding)
    sizes = [*counts, padding] if padding else counts
    parts = split(tuple(merged.items()), sizes)

    for parked, own in zip(calls, parts, strict=False):
        assert same(parked.kwargs, dict(own))


@settings(deadline=None)
@given(trees, st.integers(2, 6), st.integers(1, 5))
def test_a_call_cut_in_parts_and_its_results_joined_are_whole_again(tree, rows, first):
    whole = call(sample=sample(rows, value=3.0), tree=grow(tree, rows, 1))
    first = min(first, rows - 1)
    parts = [part(whole, 0, first), part(whole, first, rows)]

    assert [p.rows for p in parts] == [first, rows - first]
    assert same(merge(parts), merge([whole]))
    kinds = [tuple(p.kwargs.items()) for p in parts]
    if first != rows - first or first > 3:  # else a shared tensor may be as long as a part
        assert same(dict(join(kinds, [first, rows - first])), whole.kwargs)


def test_results_of_every_type_are_joined_again():
    rows = torch.arange(6.0).view(3, 2, 1, 1)
    for output in (
        (rows,),
        UNet2DConditionOutput(sample=rows),
        DiagonalGaussianDistribution(rows),
        ([torch.zeros(2, n) for n in range(3)],),
    ):
        again = join(split(output, [1, 2]), [1, 2])
        assert type(again) is type(output)
    assert torch.equal(join(split((rows,), [1, 2]), [1, 2])[0], rows)
    assert len(again[0]) == 3


def test_the_shape_of_a_call_is_that_of_one_sample():
    assert call(sample=torch.zeros(2, 4, 8, 8)).shape == (4, 8, 8)
    assert call(sample=[torch.zeros(4, 8)]).shape == (4, 8)
    assert Rows(1).shape == ()
