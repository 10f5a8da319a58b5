"""The keeper of warm models, with a model that sleeps instead of computing; and whose turn it is, on a real Valkey."""

import gc
import threading
import weakref

import pytest
import torch

from app.core import processes
from app.core import redis_keys as keys
from app.core.catalog import Defaults, ModelSpec
from app.core.errors import ConfigError, ModelRefused, OutOfMemory
from app.core.metrics import WorkerMetrics
from app.core.processes import Process
from tests.chaos.stub_worker import stub_model
from tests.tiny import build_family
from worker.engine.engine import Engine
from worker.engine.faults import DeviceLost
from worker.pipelines.load import warm
from worker.turns import PATIENCE_SECONDS, Turns
from worker.warm import BROKEN_SECONDS, STAY, TRIES, Keeper, Memory, State, close

EACH = 10  # bytes that a model is said to take


def spec_of(name, **options):
    defaults = Defaults(width=64, height=64, num_inference_steps=2, scheduler="ddim")
    return ModelSpec(name=name, source=f"/{name}", defaults=defaults, schedulers=("ddim",), **options)


FLUX = ModelSpec(
    name="flux",
    source="/flux",
    defaults=Defaults(width=32, height=32, scheduler="flow_euler"),
    schedulers=("flow_euler",),
    accepts=("guidance_scale",),
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Bench:
    """A keeper of the models `names` with room for `room` of them."""

    def __init__(self, *names, room=2, host=0, pinned=(), sizes=None):
        self.loads, self.errors, self.clock = [], {}, Clock()
        self.spoil, self.last = None, None  # what each forward raises; the denoiser that was loaded last
        self.engine = Engine({}, max_batch=2)
        self.go = threading.Event()
        self.go.set()
        sizes = dict.fromkeys(names, EACH) | (sizes or {})
        self.keeper = Keeper(
            [spec_of(name, pinned=name in pinned) for name in names],
            self.load,
            self.engine,
            WorkerMetrics(),
            device=torch.device("cpu"),
            memory=Memory(room * EACH, host * EACH),
            size=lambda spec: sizes[spec.name],
            measure=lambda model: sizes[model.spec.name],
            clock=self.clock,
        )

    def load(self, spec):
        self.go.wait(10)
        self.loads.append(spec.name)
        if error := self.errors.get(spec.name):
            raise error
        model = stub_model(0.0, 0.0, spec)
        self.last = weakref.ref(model.pipe.denoiser)
        model.pipe.denoiser.register_forward_pre_hook(self.look)
        return model

    def look(self, *about):
        if self.spoil:
            raise self.spoil

    def ended(self):
        """The load under way ends: what the loop hears of it."""
        assert self.keeper.is_loading
        assert self.keeper.bell.wait(10)
        self.keeper.bell.clear()
        return self.keeper.turn()

    def use(self, name):
        """A job of `name` comes, its model is loaded if need be, and the job ends."""
        self.keeper.enter(name)
        self.keeper.turn()
        if self.keeper.is_loading:
            self.ended()
        assert self.keeper.model(name)
        self.keeper.leave(name)
        self.clock.now += 1

    @property
    def warm(self):
        return set(self.keeper.warm)


@pytest.fixture
def bench():
    built = []

    def build(*names, **options):
        made = Bench(*names, **options)
        built.append(made)
        made.keeper.start()
        made.keeper.bell.clear()
        return made

    yield build
    for made in built:
        made.go.set()
        made.keeper.close()
        made.engine.close()


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost("x")]
)
def test_a_device_lost_in_a_load_ends_the_worker_and_not_the_load_alone(bench, error):
    made = bench("a", "b", room=1)
    made.errors["b"] = error
    made.keeper.enter("b")
    made.keeper.turn()
    with pytest.raises(DeviceLost):
        made.ended()


def test_what_fits_is_loaded_at_the_start_pinned_ones_first(bench):
    made = bench("a", "b", "c", pinned=("c",))

    assert made.loads == ["c", "a"]
    assert made.keeper.served == ["a", "b", "c"]


def test_the_least_recently_used_makes_room_and_pinned_ones_stay(bench):
    made = bench("a", "b", "c", "d", room=3, pinned=("a",))
    for name in ("c", "b", "d"):
        made.use(name)
    assert made.warm == {"a", "b", "d"}
    made.use("c")

    assert made.warm == {"a", "c", "d"}


def test_a_model_with_jobs_is_waited_for_closed_after_its_time_and_goes_with_its_last_job(bench):
    made = bench("a", "b", room=1)
    made.keeper.enter("a")
    made.keeper.enter("b")
    made.keeper.turn()
    assert made.keeper.warm == ["a"]  # it has only just been loaded
    made.clock.now += STAY + 1
    made.keeper.turn()
    assert made.keeper.warm == []  # takes nothing new
    assert made.keeper.model("a")  # and makes what it has
    made.keeper.leave("a")
    made.keeper.turn()
    [loaded] = made.ended()

    assert (loaded.name, made.keeper.warm) == ("b", ["b"])


def test_a_closed_model_is_open_again_when_nobody_waits_for_its_room(bench):
    made = bench("a", "b", room=1)
    made.keeper.enter("a")
    made.keeper.enter("b")
    made.clock.now += STAY + 1
    made.keeper.turn()
    made.keeper.leave("b")  # it was cancelled
    made.keeper.turn()

    assert made.keeper.warm == ["a"]


def test_the_loop_goes_on_while_a_model_loads(bench):
    made = bench("a", "b", room=1)
    made.go.clear()
    made.keeper.enter("b")
    for _ in range(3):
        assert made.keeper.turn() == []
    assert made.keeper.model("b") is None
    assert made.keeper.warm == ["b"]  # on its way: its jobs may be taken
    made.go.set()

    assert [loaded.name for loaded in made.ended()] == ["b"]


def test_an_evicted_models_memory_is_free_at_once(bench):
    made = bench("a", "b", room=1)
    module = weakref.ref(made.keeper.model("a").pipe.denoiser)
    gc.disable()
    try:
        made.use("b")
        assert module() is None
    finally:
        gc.enable()


def test_a_closed_models_memory_is_free_though_diffusers_marked_its_modules():
    family = build_family("Flux")
    family.alone(0)
    module = weakref.ref(family.pipe.transformer)
    assert "_diffusers_hook" in vars(module())
    model = warm(FLUX, family.pipe, torch.device("cpu"), torch.float32)
    gc.collect()
    gc.disable()
    try:
        close(model)
        del model, family
        assert module() is None
    finally:
        gc.enable()


def test_what_a_failed_load_left_is_free_at_once(bench):
    made = bench("a", "b", room=1)
    made.spoil = ValueError("a layer of another width")
    made.keeper.enter("b")
    gc.disable()
    try:
        made.keeper.turn()
        made.ended()
        assert made.keeper.places["b"].tries == 1
        assert made.last() is None
    finally:
        gc.enable()


def test_an_evicted_model_goes_to_the_hosts_memory_where_there_is_some_and_comes_back_without_a_load(bench):
    made = bench("a", "b", "c", room=1, host=1)
    made.use("b")
    assert made.keeper.places["a"].state is State.PARKED
    made.use("a")
    assert made.loads == ["a", "b"]
    made.use("c")
    assert {name: place.state.value for name, place in made.keeper.places.items()} == {
        "a": "parked",
        "b": "cold",  # the host holds one, and it was used longer ago
        "c": "warm",
    }


def test_a_load_that_fails_is_tried_again_and_then_its_jobs_hear_of_it(bench):
    made = bench("a", "b", room=1)
    made.errors["b"] = OSError("a disk that is away")
    made.keeper.enter("b")
    for tries in range(1, TRIES + 1):
        made.keeper.turn()
        heard = made.ended()
        assert bool(heard) == (tries == TRIES)
        made.clock.now += tries + 1
    assert (heard[0].name, heard[0].model) == ("b", None)
    assert made.loads.count("b") == TRIES
    made.keeper.leave("b")
    assert "b" not in made.keeper.cold  # left to others for a while
    made.errors.clear()
    made.clock.now += BROKEN_SECONDS
    assert "b" in made.keeper.cold
    made.use("b")


def test_files_that_are_refused_are_not_tried_again(bench):
    made = bench("a", "b", room=1)
    made.errors["b"] = ModelRefused("a pickle")
    made.keeper.enter("b")
    made.keeper.turn()

    assert [loaded.name for loaded in made.ended()] == ["b"]


def test_a_model_that_can_never_fit_is_not_served(bench):
    made = bench("a", "b", room=2, sizes={"b": 2 * EACH}, pinned=("a",))

    assert made.keeper.served == ["a"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), OutOfMemory("ask for a smaller picture")])
def test_a_model_that_turns_out_not_to_fit_is_served_no_more(bench, error):
    made = bench("a", "b", room=1)
    made.errors["b"] = error
    made.keeper.enter("b")
    made.keeper.turn()
    [heard] = made.ended()

    assert (heard.name, heard.model, made.keeper.served) == ("b", None, ["a"])


def test_a_worker_lives_with_those_models_that_load_and_not_without_any(bench):
    refusing = Bench("a", "b")
    refusing.errors["a"] = ModelRefused("a pickle")
    refusing.keeper.start()
    assert refusing.keeper.warm == ["b"]
    refusing.keeper.close()
    refusing.engine.close()

    hopeless = Bench("a")
    hopeless.errors["a"] = ModelRefused("a pickle")
    with pytest.raises(ConfigError, match="a pickle"):
        hopeless.keeper.start()
    hopeless.keeper.close()


def test_what_may_pass_is_no_fault_of_the_configuration():
    hopeless = Bench("a", "b")
    hopeless.errors["a"] = ModelRefused("a pickle")
    hopeless.errors["b"] = torch.OutOfMemoryError("another process has the memory")
    with pytest.raises(torch.OutOfMemoryError, match="another process"):
        hopeless.keeper.start()
    hopeless.keeper.close()


class Models:
    warm, cold, is_loading = ["a"], ["b"], False


@pytest.fixture
def turns(redis):
    clock = Clock()
    return Turns(redis, "us", Models(), clock), clock


def waits(redis, model):
    redis.zadd(keys.SHARES + keys.queue_name(model), {"share": 1})


def neighbour(redis, *warm):
    processes.beat(redis, Process(name="them", kind="worker", metrics="", version="0", models=("b",), warm=warm))


def test_a_cold_queue_is_asked_only_when_it_has_jobs(redis, turns):
    assert turns[0].next() == ["safelight.a"]
    waits(redis, "b")

    assert turns[0].next() == ["safelight.a", "safelight.b"]


def test_a_job_is_left_to_a_worker_that_has_its_model_warm_for_a_while(redis, turns):
    waits(redis, "b")
    neighbour(redis, "b")
    turns, clock = turns
    assert turns.next() == ["safelight.a"]
    assert turns.has_patience
    clock.now += PATIENCE_SECONDS

    assert turns.next() == ["safelight.a", "safelight.b"]


def test_patience_begins_anew_when_the_jobs_were_taken(redis, turns):
    waits(redis, "b")
    neighbour(redis, "b")
    turns, clock = turns
    turns.next()
    redis.delete(keys.SHARES + keys.queue_name("b"))
    clock.now += PATIENCE_SECONDS
    turns.next()
    waits(redis, "b")

    assert turns.next() == ["safelight.a"]
