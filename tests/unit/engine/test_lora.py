"""Adapters by the row, against peft's, which knows one request at a time."""

import random
from dataclasses import replace

import pytest
import torch

from tests.adapters import ATTENTION, by_peft, in_peft, write_adapter
from tests.tiny import Log, build_family, together
from worker.engine.engine import Engine
from worker.engine.lora import Adapters, LowRank
from worker.pipelines.load import targets
from worker.pipelines.lora import read

ROWS = (*ATTENTION, "conv1", "proj_in", "ff.net.0.proj")  # convolutions and linear layers
LAYERS = {"SD": ROWS, "SDXL": ROWS, "SD3": (*ATTENTION, "to_add_out", "linear"), "Flux": ATTENTION, "Wan": ATTENTION}
STACKS = [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),), (("b", 0.7), ("a", -0.4)), (("c", 1.0), ("a", 0.3))]
TOLD = 1e-5  # of the spread


class World:
    """A family, its adapters in files, and peft beside it."""

    def __init__(self, name, folder):
        self.family = build_family(name)
        layers = LAYERS[name]
        self.files = {
            "a": write_adapter(self.family, folder, "a", layers=layers),
            "b": write_adapter(self.family, folder, "b", rank=2, alpha=2, layers=layers),
            "c": write_adapter(self.family, folder, "c", rank=7, alpha=3, layers=layers[:1]),
        }

    def load(self):
        """Targets whose denoiser has all adapters."""
        read_in = {name: read(file, self.family.pipe, "tiny") for name, file in self.files.items()}
        found = targets(self.family.pipe)
        [part] = read_in["a"]
        adapters = Adapters(found[part].module, {name: parts[part] for name, parts in read_in.items()})
        return found | {part: replace(found[part], adapters=adapters)}, adapters


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = World(name, tmp_path_factory.mktemp("adapters"))
        return made[name]

    return get


@pytest.mark.parametrize("name", LAYERS)
def test_requests_of_other_adapters_weights_and_stacks_share_forwards_and_equal_peft_alone(worlds, name):
    world = worlds(name)
    with in_peft(world.family, world.files) as peft:
        alone = [by_peft(peft, 1, stack) for stack in STACKS]
    modules, adapters = world.load()
    runs = [replace(world.family.run(1), id=f"run-{k}", adapters=stack) for k, stack in enumerate(STACKS)]
    log = together(world.family, runs, [0, 0, 1, 1, 2, 2], targets=modules)
    adapters.close()

    assert [run.error for run in runs] == [None] * len(runs)
    spread = torch.stack(alone).std()
    off = max((run.result - one).abs().max() / spread for run, one in zip(runs, alone, strict=True))
    apart = min((a - b).abs().max() / spread for i, a in enumerate(alone) for b in alone[:i])
    denoised = [entry for entry in log.forwards if entry[0] in {"unet", "transformer"}]
    shared = sum(entry[2] for entry in denoised) / len(denoised)
    print(f"{name}: error/spread {off:.1e}, others {apart:.1e} apart, {shared:.1f} runs a forward")
    assert off < TOLD
    assert apart > 100 * off
    assert shared > 2


def test_an_adapter_of_weight_zero_changes_nothing(worlds):
    world = worlds("SD")
    modules, adapters = world.load()
    run = replace(world.family.run(0), adapters=(("a", 0.0),))
    together(world.family, [run], [0], targets=modules)
    adapters.close()

    assert (run.result - world.family.alone(0)).abs().max() < TOLD


def test_after_the_last_forward_no_adapter_is_left(worlds):
    world = worlds("SD")
    before = world.family.alone(0)
    modules, adapters = world.load()
    together(world.family, [replace(world.family.run(0), adapters=(("a", 1.0),))], [0], targets=modules)

    assert torch.equal(world.family.alone(0), before)
    adapters.close()
    assert not any(module._forward_hooks for module in world.family.pipe.unet.modules())


def test_an_adapter_is_gone_when_its_forward_fails():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapters = Adapters(module, {"a": {"0": LowRank(torch.ones(1, 4), torch.ones(4, 1))}})
    x = torch.ones(2, 4)
    plain = module(x)

    def fail():
        with adapters.using([(("a", 1.0),), ()]):
            assert torch.equal(module(x)[1], plain[1])
            assert torch.allclose(module(x)[0], plain[0] + 4.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert torch.equal(module(x), plain)


def test_a_layer_that_computes_other_rows_than_the_forward_is_refused():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapters = Adapters(module, {"a": {"0": LowRank(torch.ones(1, 4), torch.ones(4, 1))}})

    with adapters.using([(("a", 1.0),), ()]), pytest.raises(ValueError, match="6 rows of 2"):
        module(torch.ones(6, 4))


def test_weights_that_are_not_numbers_stay_with_the_rows_they_were_asked_for():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    broken = LowRank(torch.full((1, 4), 3e38), torch.full((4, 1), 3e38))
    adapters = Adapters(module, {"a": {"0": broken}})
    x = torch.ones(3, 4)

    with adapters.using([(), (("a", 1.0),), ()]):
        made = module(x)

    assert made.isfinite().all(1).tolist() == [True, False, True]


def test_a_convolutions_stride_and_padding_are_the_adapters_too():
    conv = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
    module = torch.nn.Sequential(conv)
    low = LowRank(torch.randn(2, 3, 3, 3), torch.randn(5, 2))
    adapters = Adapters(module, {"a": {"0": low}})
    x = torch.randn(2, 3, 8, 8)
    plain = module(x)
    merged = torch.einsum("or,richw->oichw", low.up, low.down[:, None])[:, 0]
    expected = torch.nn.functional.conv2d(x, conv.weight + 0.5 * merged, conv.bias, stride=2, padding=1)

    with adapters.using([(("a", 0.5),), ()]):
        made = module(x)

    assert torch.allclose(made[0], expected[0], atol=1e-5)
    assert torch.equal(made[1], plain[1])


@pytest.mark.parametrize("seed", range(3))
def test_a_reproducible_run_with_adapters_has_the_same_bits_in_any_crowd(worlds, seed):
    world = worlds("SD")
    modules, adapters = world.load()
    dice = random.Random(seed)

    def own():
        return replace(world.family.run(3), id="own", reproducible=True, adapters=(("b", 0.7), ("a", -0.4)))

    alone = own()
    together(world.family, [alone], [0], targets=modules)
    crowd = [
        replace(world.family.run(i), adapters=dice.choice(STACKS), reproducible=dice.random() < 0.7) for i in range(5)
    ]
    one = own()
    log = together(world.family, [one, *crowd], [dice.randrange(3) for _ in range(6)], targets=modules)
    adapters.close()

    assert torch.equal(one.result, alone.result)
    assert max(entry[2] for entry in log.of("unet")) > 1


def test_100_requests_over_20_adapters_equal_themselves_alone_and_load_nothing(tmp_path):
    family = build_family("SD img2img")  # with no prompts: the forwards are the denoiser's
    files = {f"l{k}": write_adapter(family, tmp_path, f"l{k}", rank=1 + k % 5, alpha=1 + k % 3) for k in range(20)}
    read_in = {name: read(file, family.pipe, "tiny")["unet"] for name, file in files.items()}
    found = targets(family.pipe)
    adapters = Adapters(family.pipe.unet, read_in)
    modules = found | {"unet": replace(found["unet"], adapters=adapters)}
    dice = random.Random(8)
    stacks = [
        tuple((name, dice.choice([0.3, 0.6, 1.0])) for name in dice.sample(sorted(files), dice.choice([0, 1, 1, 2])))
        for _ in range(100)
    ]

    def made(k):
        return replace(family.run(k % 7), id=f"run-{k}", adapters=stacks[k])

    alone = [made(k) for k in range(100)]
    for one in alone:
        together(family, [one], [0], targets=modules)
    for file in files.values():
        file.unlink()  # nothing is read again
    runs = [made(k) for k in range(100)]
    log = together(family, runs, [dice.randrange(8) for _ in runs], targets=modules, max_batch=32)
    adapters.close()

    assert [run.error for run in runs] == [None] * 100
    spread = torch.stack([run.result for run in runs]).std()
    assert max((run.result - one.result).abs().max() for run, one in zip(runs, alone, strict=True)) < 1e-4 * spread
    forwards = log.of("unet")
    calls = sum(entry[2] for entry in forwards)
    print(f"100 requests over 20 adapters: {calls} calls in {len(forwards)} forwards")
    assert len(forwards) < calls / 8


def test_calibration_measures_a_run_with_its_adapters(worlds):
    world = worlds("SD")
    modules, adapters = world.load()
    engine = Engine(modules, Log())
    engine.add(replace(world.family.run(0), adapters=(("a", 1.0),)))
    while not any(name == "unet" for name, _ in engine.batcher.curves):
        engine.step()
        engine.calibrate(most=4)
    engine.close()
    adapters.close()
