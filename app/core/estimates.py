"""Estimates: what a request costs, when it will start and when it will end. Pure: no clock, no Redis, no device.

Costs are seconds of the denoiser in full batches, so that they add up: a worker that has work without end does one
second of it in about one second. Waiting is what lies before a job, shared out as claim.lua does it, over the workers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

from app.core.params import GenerationParams
from app.core.tasks import strength_of

Curve = Mapping[int, float]  # rows -> seconds of one forward
GUESSED_ROW_SECONDS: Final = 0.05  # of a model that no worker was seen to serve
TURNS: Final = {"high": 9, "normal": 3, "low": 1}  # of the lanes of a share, see claim.lua
NEAR: Final = 1.03  # as in worker/engine/calibrate.py: what a worker gives up of the best for smaller batches


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker measured of pictures of one size: the denoiser's forwards, by rows."""

    pixels: int
    curve: Curve

    @property
    def row_seconds(self) -> float:
        """Seconds a row in the best batch."""
        return min(seconds / rows for rows, seconds in self.curve.items())

    @property
    def most_rows(self) -> int:
        """The fewest rows that come near that."""
        return min(rows for rows, seconds in self.curve.items() if seconds / rows <= self.row_seconds * NEAR)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast one worker makes pictures of one model, as it says itself."""

    measured: Sequence[Measured]
    guided_rows: int = 2  # rows a step of one picture with guidance
    plain_rows: int = 1  # without
    around_seconds: float = 0.0  # of a picture outside of the denoiser: encoding, decoding, storing
    drag: float = 1.0  # seconds that pass while the denoiser computes for one
    full_drag: float = 1.0  # that pass while more waits than fits into its batches, and it does one second of cost
    max_images: int = 64  # it has in hand at once
    not_fitting: Sequence[int] = ()  # sizes (pixels) of which not even one row fits into its memory

    def near(self, pixels: int) -> Measured:
        """What was measured, or is likely, for pictures of this size: the work grows with the pixels."""
        found = min(self.measured, key=lambda m: abs(m.pixels - pixels))
        if found.pixels == pixels:
            return found
        scale = pixels / found.pixels
        return Measured(pixels, {rows: seconds * scale for rows, seconds in found.curve.items()})


def pace_from(about: Mapping[str, Any]) -> Pace:
    """Read what `dataclasses.asdict` and JSON made of a pace. Raises KeyError, TypeError, ValueError."""
    measured = [Measured(m["pixels"], {int(n): float(t) for n, t in m["curve"].items()}) for m in about["measured"]]
    if not measured or not all(m.curve for m in measured):
        raise ValueError("a pace needs something that was measured")
    known = {name: about[name] for name in Pace.__slots__ if name in about and name != "measured"}
    return Pace(measured, **known)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request takes. `seconds` of the denoiser in full batches; `rows` of a forward with all its pictures."""

    seconds: float
    rows: int
    steps: int
    alone_seconds: float  # that pass where it has a worker to itself
    is_known: bool = True  # False: guessed, because no worker has said how fast it is


def steps_taken(scheduler: str, steps: int) -> int:
    """Timesteps that a noise scheduler takes, as worker/pipelines/schedulers.py has them."""
    if scheduler.endswith("heun"):
        return 2 * steps - 1
    return steps + (steps > 1) if scheduler == "pndm" else steps


def cost_of(params: GenerationParams, pace: Pace | None) -> Cost:
    """The cost of a request: rows x steps x pictures; guidance doubles the rows where the model does it that way."""
    steps = _steps(params)
    if pace is None:
        rows = params.num_images * (2 if params.guidance_scale > 1 else 1)
        guess = steps * rows * GUESSED_ROW_SECONDS
        return Cost(guess, rows, steps, guess, is_known=False)
    rows = params.num_images * (pace.guided_rows if params.guidance_scale > 1 else pace.plain_rows)
    measured = pace.near(params.width * params.height)
    alone = steps * forward_seconds(measured.curve, rows) + pace.around_seconds
    return Cost(steps * rows * measured.row_seconds, rows, steps, alone)


def _steps(params: GenerationParams) -> int:
    steps, strength = params.num_inference_steps, strength_of(params)
    # As diffusers' img2img pipelines count (get_timesteps).
    return steps_taken(params.scheduler, steps if strength is None else max(int(steps * strength), 1))


def forward_seconds(curve: Curve, rows: int) -> float:
    """Seconds that `rows` rows take, in one forward or, beyond the largest that was measured, in several."""
    below = max((n for n in curve if n <= rows), default=None)
    above = min((n for n in curve if n >= rows), default=None)
    if below is None:
        return curve[min(curve)]
    if above is None:
        return curve[below] * rows / below
    part = (rows - below) / max(above - below, 1)
    return curve[below] + part * (curve[above] - curve[below])


@dataclass(frozen=True, slots=True)
class Load:
    """What waits and runs in the queue of a model, as one tenant's next job of one priority finds it. Seconds: cost."""

    ahead: float = 0.0  # of its own lane
    lanes: Mapping[str, float] = field(default_factory=dict)  # of its tenant's other lanes, by priority
    tenants: Sequence[tuple[float, float]] = ()  # the other tenants: what waits, and their weight against its own
    queues: Sequence[float] = ()  # what waits in the queues of other models that the same workers serve
    running: float = 0.0
    running_rows: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """From now on: seconds until a worker takes the job, and until it has ended."""

    start_seconds: float
    finish_seconds: float


def waiting_before(load: Load, priority: str) -> float:
    """The work that is done before a job's turn comes: what lies before it, and what others get meanwhile.

    While its own lane gets x, another lane gets at most x times its turns against the lane's, and no more than waits
    there; so for tenants, by weight, and for queues, in turn.
    """
    own = TURNS[priority]
    mine = load.ahead + sum(min(work, load.ahead * TURNS[other] / own) for other, work in load.lanes.items())
    mine += sum(min(work, mine * weight) for work, weight in load.tenants)
    return mine + sum(min(work, mine) for work in load.queues)


def estimate(cost: Cost, load: Load, paces: Sequence[Pace], priority: str, pixels: int) -> Estimate | None:
    """When a request would start and end, or None where no worker serves its model.

    While more waits than the workers have room for, they do one second of cost in `full_drag` seconds each. From its
    start on, the job shares the denoiser of its worker with what else is in the making there.
    """
    if not paces:
        return None
    before = waiting_before(load, priority)
    row_work = load.running / load.running_rows if load.running_rows else cost.seconds / cost.rows
    room = sum(pace.max_images * pace.guided_rows for pace in paces)  # rows
    free = max(room - load.running_rows, 0) * row_work
    is_late = before > 0 or free < cost.seconds
    start = max(before - free, 0.0) / sum(1 / pace.full_drag for pace in paces) if is_late else 0.0
    company = min(load.running_rows + before / max(row_work, 1e-9), room) / len(paces)
    return Estimate(start, start + in_company(cost, company, paces[0], pixels))


def in_company(cost: Cost, company: float, pace: Pace, pixels: int) -> float:
    """Seconds from a job's start to its end beside `company` rows, all of which get on as fast."""
    measured, rows = pace.near(pixels), cost.rows + company
    if rows <= measured.most_rows:
        step = forward_seconds(measured.curve, ceil(rows)) * pace.drag
    else:
        step = rows * measured.row_seconds * pace.full_drag
    return cost.steps * step + pace.around_seconds


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a worker's memory holds a request; None: nobody knows."""

    fits: bool | None
    reason: str


def memory_fit(params: GenerationParams, paces: Sequence[Pace]) -> Fit:
    """What the workers have seen of pictures of this size and of larger and smaller ones."""
    pixels, size = params.width * params.height, f"{params.width}x{params.height}"
    if not paces:
        return Fit(None, "no live worker serves the model")
    if any(m.pixels >= pixels for pace in paces for m in pace.measured):
        return Fit(True, f"a worker has made pictures of {size} or larger")
    if all(any(n <= pixels for n in pace.not_fitting) for pace in paces):
        return Fit(False, f"every worker has run out of memory over pictures of {size} or smaller")
    return Fit(None, f"no worker has made a picture as large as {size} yet")


def remaining_seconds(own: Iterable[tuple[float, float]], others: Iterable[tuple[float, float]]) -> float:
    """Seconds until a running job's last picture is through the denoiser, where what is due first goes first.

    Each is (when it is due, seconds of the denoiser it still needs).
    """
    mine = sorted(own)
    if not mine:
        return 0.0
    last = mine[-1][0]
    return sum(work for _, work in mine) + sum(work for due, work in others if due <= last)
