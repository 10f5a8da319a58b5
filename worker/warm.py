"""Keeper: which of the served models are in memory; loads one in a thread while the others go on, and lets others go.

A model is cold (on disk), parked (in the host's memory, below a GPU's), loading, or warm. The least recently used of
those that no job needs make room for one that a job waits for; where all are busy, the one used longest ago is closed:
it takes no new jobs and goes when it has made those it has. Pinned ones stay.
"""

import gc
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from queue import SimpleQueue
from typing import Final, Protocol

import structlog
import torch

from app.core.catalog import ModelSpec
from app.core.errors import ConfigError, ModelRefused
from app.core.metrics import WorkerMetrics
from worker.engine.batcher import Shape
from worker.engine.calibrate import Curve
from worker.engine.engine import CALIBRATED_ROWS, Engine
from worker.engine.faults import DeviceLost, is_device_lost, is_out_of_memory
from worker.engine.target import Target
from worker.pipelines.load import WarmModel
from worker.pipelines.tasks import warm_up

log = structlog.get_logger()
TRIES: Final = 3  # loads of a model before the jobs that wait for it fail
PAUSE_SECONDS: Final = 1.0  # before the second, twice that before the third
BROKEN_SECONDS: Final = 30.0  # for which a model that could not be loaded is left to other workers
STAY: Final = 5.0  # times what its loading took, a busy model stays before it is closed for another


class State(Enum):
    COLD = "cold"
    PARKED = "parked"
    LOADING = "loading"
    WARM = "warm"
    UNFIT = "unfit"  # larger than this worker's memory: it is not served


@dataclass(slots=True, eq=False)
class Place:
    """A served model, and where it is. The step loop's thread owns it; others read."""

    spec: ModelSpec
    bytes: int  # estimated, measured once it was loaded
    state: State = State.COLD
    model: WarmModel | None = None
    jobs: int = 0  # in hand
    used: float = 0.0  # when a job last needed it, in seconds of the keeper's clock
    since: float = 0.0  # warm
    seconds: float = 0.0  # its last load took
    tries: int = 0
    pause_until: float = 0.0
    is_wanted: bool = False
    is_closing: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def targets(self) -> dict[str, Target]:
        model = self.model  # which the step loop's thread may take away meanwhile
        return {f"{self.name}:{part}": target for part, target in model.modules.items()} if model else {}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of loading a model: the model, or the error."""

    name: str
    seconds: float
    model: WarmModel | None = None
    curves: Mapping[Shape, Curve] = field(default_factory=dict)
    error: Exception | DeviceLost | None = None


class Observer(Protocol):
    """What watches the forwards has to know the modules."""

    def attach(self, targets: Mapping[str, Target]) -> None: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes for models on the device, and in the host's memory below it."""

    device: int
    host: int = 0


class Keeper:
    """Owned by the step loop's thread; `warm`, `cold` and `served` may be asked by any."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        load: Callable[[ModelSpec], WarmModel],
        engine: Engine,
        metrics: WorkerMetrics,
        *,
        device: torch.device,
        memory: Memory,
        size: Callable[[ModelSpec], int] = lambda _: 0,
        measure: Callable[[WarmModel], int] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places = {spec.name: Place(spec, 0) for spec in specs}
        self.bell = threading.Event()  # rings when a load has ended
        self._load = load
        self._engine = engine
        self._metrics = metrics
        self.device = device
        self.memory = memory
        self._size = size
        self._measure = measure or size_of
        self._observer = observer
        self._clock = clock
        self._curves: dict[str, dict[Shape, Curve]] = {}
        self._loads: SimpleQueue[Loaded] = SimpleQueue()
        self._loader = ThreadPoolExecutor(1, "load")
        self._is_loading = False

    # What any thread may ask.

    @property
    def served(self) -> list[str]:
        """The models that this worker makes pictures of, warm or not."""
        return [name for name, place in self.places.items() if place.state is not State.UNFIT]

    @property
    def warm(self) -> list[str]:
        """Those whose jobs can be taken now, or soon: loading ones too."""
        return [
            name
            for name, place in self.places.items()
            if place.state in (State.WARM, State.LOADING) and not place.is_closing
        ]

    @property
    def cold(self) -> list[str]:
        """Those that would have to be loaded first, and may be."""
        now = self._clock()
        return [
            name
            for name, place in self.places.items()
            if place.state in (State.COLD, State.PARKED) and now >= place.pause_until and not place.is_wanted
        ]

    @property
    def is_loading(self) -> bool:
        return self._is_loading

    # What the step loop asks.

    def model(self, name: str) -> WarmModel | None:
        """The model, if it is warm; None for one that is not, or that this worker does not serve."""
        place = self.places.get(name)
        return place.model if place and place.state is State.WARM else None

    def enter(self, name: str) -> None:
        """A job of this model came into our hands; it is loaded if need be."""
        place = self.places[name]
        place.jobs += 1
        place.used = self._clock()
        place.is_wanted = place.state not in (State.WARM, State.UNFIT)

    def leave(self, name: str) -> None:
        """A job of this model is out of our hands."""
        if (place := self.places.get(name)) and place.jobs:
            place.jobs -= 1
            place.used = self._clock()
            place.is_wanted = place.is_wanted and place.jobs > 0

    def turn(self) -> list[Loaded]:
        """Take what was loaded in, and begin the next load; what ended, well or for good."""
        ended = []
        while not self._loads.empty():
            if (found := self._take(self._loads.get())) is not None:
                ended.append(found)
        if not self._is_loading:
            self._begin()
        return ended

    def start(self) -> None:
        """Load what is pinned, the default and what else fits, one after another.

        Raises ConfigError if none can be used, and whatever else the loads met if none did load: that may pass.
        """
        for place in self.places.values():
            self._estimate(place)
        if not self.served:
            raise ConfigError("none of the served models can be used; the log says why for each")
        errors: list[BaseException] = []
        for place in sorted(self.places.values(), key=lambda p: (not p.spec.pinned, not p.spec.default)):
            is_first = not any(p.state is State.WARM for p in self.places.values())
            if place.state is State.UNFIT or not (place.spec.pinned or is_first or place.bytes <= self._free()):
                continue
            self._submit(place, [], rows=None)
            found = self._loads.get()
            self._take(found)
            errors += [found.error] if found.error else []
        if not any(place.state is State.WARM for place in self.places.values()):
            raise next((error for error in errors if not isinstance(error, ConfigError)), errors[0])

    def close(self) -> None:
        """Wait for a load under way, and take nothing more in."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    @property
    def bytes(self) -> int:
        """Of the models on the device, and of the one on its way there."""
        return sum(p.bytes for p in self.places.values() if p.state in (State.WARM, State.LOADING))

    @property
    def parked_bytes(self) -> int:
        return sum(p.bytes for p in self.places.values() if p.state is State.PARKED)

    # Loading.

    def _estimate(self, place: Place) -> None:
        """What its files say it takes; one whose files are not here yet is taken to fit until it was loaded."""
        try:
            place.bytes = self._size(place.spec)
        except ConfigError as error:  # if its files are refused, its load says so to the jobs that wait for it
            log.warning("model.size_unknown", model=place.name, reason=error.message)
        if not self._fits_ever(place):
            self._refuse(place, ConfigError(f"it takes {place.bytes} bytes of {self.memory.device}"))

    def _fits_ever(self, place: Place) -> bool:
        pinned = sum(p.bytes for p in self.places.values() if p.spec.pinned and p is not place)
        return place.bytes <= self.memory.device - pinned

    def _refuse(self, place: Place, error: BaseException) -> None:
        place.state, place.is_wanted = State.UNFIT, False
        log.error("model.not_served", model=place.name, reason=str(error))

    def _free(self) -> int:
        return self.memory.device - self.bytes

    def _begin(self) -> None:
        """Start the load that was wanted first, if there is room for it or room can be made."""
        now = self._clock()
        wanted = [p for p in self.places.values() if p.is_wanted and now >= p.pause_until]
        if not wanted:
            for place in self.places.values():
                place.is_closing = False  # nobody waits for its room any more
            return
        place = min(wanted, key=lambda p: p.used)
        if (victims := self._victims(place, now)) is not None:
            self._submit(place, victims, rows=1 if any(p.jobs for p in self.places.values() if p.model) else None)

    def _victims(self, wanted: Place, now: float) -> list[Place] | None:
        """The models that have to leave for `wanted`; None where busy ones have to be waited for."""
        missing = wanted.bytes - self._free()
        victims: list[Place] = []
        others = [p for p in self.places.values() if p.state is State.WARM and not p.spec.pinned]
        for place in sorted(others, key=lambda p: (p.jobs > 0, p.used)):
            if missing <= 0:
                break
            if place.jobs:
                # It had its time: it takes nothing more, and goes when its jobs are done.
                place.is_closing = place.is_closing or now - place.since >= STAY * max(place.seconds, 1.0)
            victims.append(place)
            missing -= place.bytes
        return None if any(p.jobs for p in victims) else victims

    def _submit(self, place: Place, victims: list[Place], rows: int | None) -> None:
        """Load `place` in the thread, which first lets the victims go; `rows` are measured at most (None: all)."""
        place.state, place.is_wanted, self._is_loading = State.LOADING, True, True  # first: it is parked no more
        leaving = [self._evict(victim) for victim in victims]
        log.info("model.loading", model=place.name, bytes=place.bytes, evicted=[p.name for p in victims])
        known = self._curves.get(place.name, {})
        most = self._engine.batcher.max_batch or CALIBRATED_ROWS
        self._loader.submit(self._work, place, leaving, known, rows or most)

    def _evict(self, place: Place) -> WarmModel | None:
        """Take a model away from the engine; its weights move in the loading thread. None: nothing of it is kept."""
        assert place.model, "only warm models are evicted"
        model = place.model
        self._engine.detach(list(place.targets))
        place.is_closing = False
        self._metrics.model_evictions_total.labels(place.name).inc()
        if place.bytes + self._parked_without(place) <= self.memory.host:
            place.state = State.PARKED
            return model
        place.state, place.model = State.COLD, None
        close(model)
        return None

    def _parked_without(self, place: Place) -> int:
        """Bytes parked once those used longest ago have made room for `place`."""
        parked = sorted((p for p in self.places.values() if p.state is State.PARKED), key=lambda p: p.used)
        while parked and place.bytes + sum(p.bytes for p in parked) > self.memory.host:
            oldest = parked.pop(0)
            assert oldest.model, "what is parked is in memory"
            close(oldest.model)
            oldest.state, oldest.model = State.COLD, None
        return sum(p.bytes for p in parked)

    def _work(self, place: Place, leaving: list[WarmModel | None], known: Mapping[Shape, Curve], rows: int) -> None:
        """In the loading thread: from disk or the host's memory to the device, and a first picture there."""
        began = self._clock()
        try:
            park(leaving)
            model, curves = self._bring(place, known, rows)
            loaded = Loaded(place.name, self._clock() - began, model, curves)
        except (Exception, DeviceLost) as error:  # whatever is wrong with a model, the worker lives
            lost = DeviceLost(str(error)) if is_device_lost(error) else error
            loaded = Loaded(place.name, self._clock() - began, error=lost)
            if not isinstance(lost, DeviceLost):
                log.exception("model.not_loaded", model=place.name, tries=place.tries + 1)
                untie(error)
                collect()
        self._loads.put(loaded)
        self.bell.set()

    def _bring(self, place: Place, known: Mapping[Shape, Curve], rows: int) -> tuple[WarmModel, dict[Shape, Curve]]:
        """The model on the device, from the host's memory or from disk, and what a first picture measured."""
        model = place.model
        if model:
            move(model, model.device)
        else:
            model = self._load(place.spec)
        try:
            return model, self._try_out(place.name, model, known, rows)
        except BaseException:
            close(model)
            raise

    def _try_out(self, name: str, model: WarmModel, known: Mapping[Shape, Curve], rows: int) -> dict[Shape, Curve]:
        """A first picture in an engine of its own, which loads kernels and measures forwards beside the step loop."""
        engine = Engine({})
        engine.attach({f"{name}:{part}": target for part, target in model.modules.items()}, known)
        try:
            warm_up(model, engine, rows)
        finally:
            engine.close()
        return engine.batcher.curves

    def _take(self, loaded: Loaded) -> Loaded | None:
        """A load has ended: into the engine, or again later. None where the jobs that wait are to wait on.

        Raises DeviceLost where that is what it met.
        """
        place, self._is_loading = self.places[loaded.name], False
        if isinstance(loaded.error, DeviceLost):
            raise loaded.error
        if loaded.error is not None:
            return self._failed(place, loaded)
        assert loaded.model, "a load gives a model or an error"
        place.model, place.state, place.is_wanted = loaded.model, State.WARM, False
        place.bytes, place.tries, place.seconds = self._measure(loaded.model), 0, loaded.seconds
        place.since = place.used = self._clock()
        self._curves[place.name] = dict(loaded.curves)
        if self._observer:
            self._observer.attach(place.targets)
        self._engine.attach(place.targets, loaded.curves)
        self._metrics.model_load_seconds.labels(place.name).set(loaded.seconds)
        self._metrics.model_loads_total.labels(place.name, "ok").inc()
        about = {"seconds": round(loaded.seconds, 3), "bytes": place.bytes, "device": str(loaded.model.device)}
        log.info("model.warm", model=place.name, **about)
        return loaded

    def _failed(self, place: Place, loaded: Loaded) -> Loaded | None:
        place.model, place.state = None, State.COLD
        place.tries += 1
        self._metrics.model_loads_total.labels(place.name, "failed").inc()
        assert loaded.error, "this is about an error"
        if is_out_of_memory(loaded.error):
            # The estimate was too low, or something else fills the device: alone on it, or not at all.
            place.bytes = max(place.bytes, self.memory.device - self.bytes + 1)
            if not self._fits_ever(place):
                self._refuse(place, loaded.error)
                return loaded
        if isinstance(loaded.error, ModelRefused) or place.tries >= TRIES:
            place.tries, place.is_wanted, place.pause_until = 0, False, self._clock() + BROKEN_SECONDS
            return loaded
        place.pause_until = self._clock() + PAUSE_SECONDS * place.tries
        return None


def modules_of(model: WarmModel) -> list[torch.nn.Module]:
    """Every module of the pipeline and of its variants, once."""
    components = getattr(model.pipe, "components", {}).values()
    found = {id(m): m for m in components if isinstance(m, torch.nn.Module)}
    found |= {id(target.module): target.module for target in model.modules.values()}
    return list(found.values())


def size_of(model: WarmModel) -> int:
    """Bytes of its parameters, buffers and adapters."""
    tensors = [t for m in modules_of(model) for t in (*m.parameters(), *m.buffers())]
    stored = {t.data_ptr(): t.nbytes for t in tensors}
    return sum(stored.values()) + sum(t.adapters.nbytes for t in model.modules.values() if t.adapters)


def move(model: WarmModel, device: torch.device) -> None:
    """All its weights to `device`, in place: whatever refers to its modules stays right."""
    for module in modules_of(model):
        module.to(device)
    for target in model.modules.values():
        if target.adapters:
            target.adapters.to(device)


def park(leaving: list[WarmModel | None]) -> None:
    """Empty the list: what is in it goes to the host's memory, and its room on the device is free."""
    while leaving:
        if model := leaving.pop():
            move(model, torch.device("cpu"))
    collect()


def close(model: WarmModel) -> None:
    """Undo what ties its modules into a circle, so that their memory is free once nothing refers to them."""
    for target in model.modules.values():
        if target.adapters:
            target.adapters.close()
    for module in modules_of(model):
        for part in module.modules():
            vars(part).pop("_diffusers_hook", None)  # diffusers' cache_context leaves it, and it refers to the module


def untie(error: BaseException | None) -> None:
    """Take their tracebacks from an error that is kept and from its causes: their frames hold what was being loaded."""
    while error:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def collect() -> None:
    """Give the device back what nothing refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
