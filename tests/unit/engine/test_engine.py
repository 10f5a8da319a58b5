import gc
import time
import weakref
from functools import partial

import pytest
import torch

from app.core.errors import GenerationFailed, InvalidOutput, OutOfMemory
from tests.unit.engine.toys import Toy, engine_of, finish, toy_run, walk
from worker.engine.batcher import PROBE
from worker.engine.engine import STARTING_SECONDS, Engine
from worker.engine.faults import DeviceLost
from worker.engine.run import Aborted, Run
from worker.engine.target import Phase, Target


def test_runs_of_different_lengths_share_forwards_and_leave_when_they_are_done():
    toy = Toy()
    engine = engine_of(toy)
    runs = [toy_run(toy, f"r{steps}", steps) for steps in (3, 1, 2)]
    for run in runs:
        engine.add(run)

    assert finish(engine) == ["r1", "r2", "r3"]
    assert [run.result for run in runs] == [6.0, 1.0, 3.0]
    assert toy.batches == [3, 2, 1]


def test_a_run_joins_at_the_next_step():
    toy = Toy()
    engine = engine_of(toy)
    engine.add(toy_run(toy, "long", 4))
    engine.step()
    engine.add(toy_run(toy, "late", 2))

    assert finish(engine) == ["late", "long"]
    assert toy.batches == [1, 2, 2, 1]


def test_a_short_run_added_during_a_long_one_ends_first_even_when_they_cannot_share_a_forward():
    toy = Toy()
    engine = engine_of(toy, max_batch=1)
    engine.add(toy_run(toy, "long", 200))
    for _ in range(20):
        engine.step()
    engine.add(toy_run(toy, "short", 5))

    assert finish(engine) == ["short", "long"]


def test_many_new_runs_start_a_few_at_a_time_so_that_those_in_flight_go_on():
    toy = Toy()

    def slow(run: Run) -> float:
        time.sleep(2 * STARTING_SECONDS / 3)
        return walk(toy, 1, 0.0, run)

    engine = engine_of(toy)
    going = toy_run(toy, "going", 5)
    engine.add(going)
    engine.step()
    for i in range(4):
        engine.add(Run(f"new-{i}", slow, 1))
    engine.step()

    assert going.step == 2
    assert [run.phase for run in engine.runs.values()].count(Phase.QUEUED) == 2
    assert len(finish(engine)) == 3


def test_an_id_is_in_flight_once():
    toy = Toy()
    engine = engine_of(toy)
    engine.add(toy_run(toy, "a", 1))

    with pytest.raises(ValueError, match="in flight"):
        engine.add(toy_run(toy, "a", 1))


def test_phase_and_step_of_a_run_are_true_between_steps():
    toy = Toy()
    engine = engine_of(toy)
    run = toy_run(toy, "a", 2)
    engine.add(run)
    seen = [(run.phase, run.step)]
    while not engine.is_idle:
        engine.step()
        seen.append((run.phase, run.step))

    assert seen == [(Phase.QUEUED, 0), (Phase.DENOISING, 1), (Phase.DENOISING, 2)]


def test_each_run_is_charged_its_share_of_the_denoiser():
    toy = Toy()
    engine = engine_of(toy)
    long, short = toy_run(toy, "long", 8), toy_run(toy, "short", 2)
    engine.add(long)
    engine.add(short)
    finish(engine)

    assert 0 < short.seconds < long.seconds


def test_an_aborted_run_is_gone_at_once_and_its_batchmates_end_as_they_would_have():
    toy = Toy()
    engine = engine_of(toy, max_batch=16)
    runs = [toy_run(toy, f"r{i}", 5, value=i) for i in range(16)]
    for run in runs:
        engine.add(run)
    engine.step()

    assert engine.abort("r7")
    assert isinstance(runs[7].error, Aborted)
    assert "r7" not in engine.runs
    finish(engine)
    assert [run.result for run in runs if run is not runs[7]] == [i + 15.0 for i in range(16) if i != 7]
    assert toy.batches == [16, 15, 15, 15, 15]


def test_a_run_can_be_aborted_before_it_starts_and_not_after_it_ended():
    toy = Toy()
    engine = engine_of(toy)
    run = toy_run(toy, "a", 1)
    engine.add(run)

    assert engine.abort("a")
    assert not engine.abort("a")
    assert engine.is_idle
    assert run.is_finished
    assert engine.step() == []
    assert toy.batches == []


def test_no_except_exception_of_a_pipeline_swallows_an_abort():
    toy = Toy()

    def stubborn(run: Run) -> float:
        for _ in range(100):
            try:
                toy(torch.zeros(1, 4), torch.tensor(1))
            except Exception:  # noqa: BLE001
                continue
        return 0.0

    engine = engine_of(toy)
    run = Run("a", stubborn, 100)
    engine.add(run)
    engine.step()

    assert engine.abort("a")
    assert isinstance(run.error, Aborted)


def test_a_run_that_calls_the_model_while_it_is_being_aborted_still_ends():
    toy = Toy()

    def tidy(run: Run) -> None:
        try:
            walk(toy, 10, 0.0, run)
        finally:
            walk(toy, 2, 0.0, run)

    engine = engine_of(toy)
    run = Run("a", tidy, 10)
    engine.add(run)
    engine.step()

    assert engine.abort("a")
    assert run.is_finished
    assert engine.step() == []


def test_an_error_in_a_runs_own_code_fails_that_run_alone():
    toy = Toy()

    def broken(run: Run) -> None:
        walk(toy, 2, 0.0, run)
        raise KeyError("oops")

    engine = engine_of(toy)
    bad, good = Run("bad", broken, 2), toy_run(toy, "good", 4)
    engine.add(bad)
    engine.add(good)

    assert finish(engine) == ["bad", "good"]
    assert isinstance(bad.error, GenerationFailed)
    assert isinstance(bad.error.__cause__, KeyError)
    assert "oops" not in bad.error.message
    assert good.result == 10.0


def test_an_error_that_a_caller_can_act_on_stays_what_it_is():
    def picky(run: Run) -> None:
        raise InvalidOutput("not a number")

    engine = engine_of(Toy())
    run = Run("a", picky, 1)
    engine.add(run)

    assert engine.step() == [run]
    assert isinstance(run.error, InvalidOutput)


def test_an_error_in_a_shared_forward_fails_only_the_run_that_caused_it():
    toy = Toy(poison=66.0)
    engine = engine_of(toy)
    runs = [toy_run(toy, f"r{i}", 3, value=66.0 if i == 2 else i) for i in range(5)]
    for run in runs:
        engine.add(run)
    finish(engine)

    assert isinstance(runs[2].error, GenerationFailed)
    assert [run.result for run in runs if run is not runs[2]] == [6.0, 7.0, 9.0, 10.0]
    assert not engine.batcher.solitary


def test_calls_that_fail_only_when_merged_go_alone_from_then_on():
    class Lonely(Toy):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
            if sample.shape[0] > 1:
                self.batches.append(sample.shape[0])
                raise IndexError("one at a time")
            return super().forward(sample, timestep, scale)

    toy = Lonely()
    engine = engine_of(toy)
    runs = [toy_run(toy, f"r{i}", 3) for i in range(3)]
    for run in runs:
        engine.add(run)
    finish(engine)

    assert [run.result for run in runs] == [6.0] * 3
    assert toy.batches.count(3) == 1


def test_a_batch_that_does_not_fit_is_split_until_it_does_and_never_tried_again():
    toy = Toy(fits=3)
    engine = engine_of(toy)
    runs = [toy_run(toy, f"r{i}", 2, value=i) for i in range(8)]
    for run in runs:
        engine.add(run)
    finish(engine)

    assert [run.result for run in runs] == [i + 3.0 for i in range(8)]
    assert toy.batches[:3] == [8, 4, 2]
    assert toy.batches.count(8) == 1


def test_a_batch_that_did_not_fit_is_tried_again_when_the_smaller_ones_have_long_fitted():
    toy = Toy(fits=3)
    engine = engine_of(toy)
    for i in range(4):
        engine.add(toy_run(toy, f"r{i}", PROBE + 2))
    engine.step()
    toy.fits = 4
    finish(engine)

    assert toy.batches.count(4) > 1


def test_only_the_run_that_cannot_fit_alone_is_out_of_memory():
    class Narrow(Toy):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
            if sample.shape[1] > 4:
                raise torch.OutOfMemoryError("no room")
            return super().forward(sample, timestep, scale)

    toy = Narrow()

    def wide(run: Run) -> None:
        toy(torch.zeros(2, 8), torch.tensor(1))

    engine = engine_of(toy)
    big, small = Run("big", wide, 1), toy_run(toy, "small", 2)
    engine.add(big)
    engine.add(small)
    finish(engine)

    assert isinstance(big.error, OutOfMemory)
    assert small.result == 3.0


def test_a_call_whose_rows_do_not_fit_at_once_is_made_in_parts_and_never_tried_whole_again():
    toy = Toy(fits=2)

    def rows(run: Run) -> list[float]:
        sample = torch.arange(5.0)[:, None].repeat(1, 4)
        for _ in range(2):
            sample = toy(sample, torch.arange(5))[0]
        return sample[:, 0].tolist()

    engine = engine_of(toy)
    run = Run("a", rows, 2)
    engine.add(run)
    finish(engine)

    assert run.result == [0.0, 3.0, 6.0, 9.0, 12.0]
    assert toy.batches.count(5) == 1
    assert max(toy.batches[-3:]) == 2


def test_padded_batches_that_do_not_fit_lower_the_cap_of_others_no_further_than_their_size_says():
    toy = Toy(fits=7)
    engine = engine_of(toy, bucket=8)
    for i in range(4):
        engine.add(toy_run(toy, f"r{i}", 1, reproducible=True))
    finish(engine)

    assert set(toy.batches) == {8}
    assert set(engine.batcher.limits.values()) == {4}


def test_what_a_run_was_made_from_goes_with_its_end():
    toy, source = Toy(), Toy()
    gone = weakref.ref(source)
    run = Run("a", partial(lambda _, run: walk(toy, 1, 0.0, run), source), 1)
    del source
    engine = engine_of(toy)
    engine.add(run)
    finish(engine)
    gc.collect()

    assert run.result == 1.0
    assert gone() is None


def test_a_reproducible_call_that_does_not_fit_is_not_made_in_parts():
    toy = Toy(fits=2)

    def rows(run: Run) -> None:
        toy(torch.zeros(4, 4), torch.tensor(1))

    engine = engine_of(toy, bucket=4)
    run = Run("a", rows, 1, reproducible=True)
    engine.add(run)
    finish(engine)

    assert isinstance(run.error, OutOfMemory)


STICKY = "CUDA error: an illegal memory access was encountered"


class Dying(Toy):
    """A device that is lost at the third forward, and answers nobody after that."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        if len(self.batches) == 2:
            raise torch.AcceleratorError(STICKY)
        return super().forward(sample, timestep, scale)


def test_a_lost_device_ends_the_step_and_no_run_is_blamed():
    toy = Dying()
    engine = engine_of(toy)
    runs = [toy_run(toy, f"r{i}", 5) for i in range(3)]
    for run in runs:
        engine.add(run)
    engine.step()
    engine.step()

    with pytest.raises(DeviceLost, match="illegal memory access"):
        engine.step()
    assert [run.error for run in runs] == [None] * 3
    assert engine.abort("r1")
    engine.close()
    assert isinstance(runs[0].error, Aborted)
    assert engine.is_idle


def test_a_device_that_is_lost_in_a_runs_own_code_ends_the_step_too():
    def unlucky(run: Run) -> None:
        raise torch.AcceleratorError(STICKY)

    toy = Toy()
    engine = engine_of(toy)
    engine.add(toy_run(toy, "a", 2))
    engine.add(Run("b", unlucky, 1))

    with pytest.raises(DeviceLost):
        engine.step()
    engine.close()


@pytest.mark.parametrize("text", ["CUDA error: invalid configuration argument", "device kernel image is invalid"])
def test_an_error_that_the_device_survives_fails_its_run_alone(text):
    def unlucky(run: Run) -> None:
        raise torch.AcceleratorError(text)

    toy = Toy()
    engine = engine_of(toy)
    bad, good = Run("bad", unlucky, 1), toy_run(toy, "good", 2)
    engine.add(bad)
    engine.add(good)
    finish(engine)

    assert isinstance(bad.error, GenerationFailed)
    assert good.result == 3.0


def test_cudas_own_out_of_memory_is_one():
    def unlucky(run: Run) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    engine = engine_of(Toy())
    run = Run("a", unlucky, 1)
    engine.add(run)
    engine.step()

    assert isinstance(run.error, OutOfMemory)


def test_grad_mode_stays_off_within_and_comes_back_after():
    toy = Toy()
    engine = engine_of(toy)
    for steps in (1, 4, 2):  # each enters and leaves its own no_grad at another time
        engine.add(toy_run(toy, f"r{steps}", steps))
    engine.step()
    engine.abort("r4")
    finish(engine)

    assert not toy.saw_grad
    assert torch.is_grad_enabled()


def test_modules_called_outside_a_run_or_within_a_forward_are_not_intercepted():
    inner = Toy()

    class Outer(Toy):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
            return super().forward(inner(sample, timestep)[0], timestep, scale)

    outer = Outer()
    engine = Engine({"outer": Target(outer, Phase.DENOISING), "inner": Target(inner, Phase.ENCODING)})
    run = toy_run(outer, "a", 2)
    engine.add(run)
    finish(engine)

    assert run.result == 6.0
    assert outer(torch.zeros(1, 4), torch.ones(1))[0][0, 0].item() == 2.0


def test_an_intercepted_module_stays_what_it_is_and_close_undoes_it():
    toy = Toy()
    engine = engine_of(toy)
    waiting = toy_run(toy, "a", 2)
    engine.add(waiting)
    engine.step()
    assert isinstance(toy, Toy)
    assert "forward" in vars(toy)

    engine.close()

    assert "forward" not in vars(toy)
    assert isinstance(waiting.error, Aborted)
    assert engine.is_idle


def test_a_method_that_a_hook_replaced_on_the_instance_comes_back():
    toy = Toy()
    plain = toy.forward

    def hooked(sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return plain(sample, timestep, scale=2.0)

    toy.forward = hooked
    engine = engine_of(toy)
    run = toy_run(toy, "a", 2)
    engine.add(run)
    finish(engine)
    engine.close()

    assert run.result == 6.0
    assert toy.forward is hooked


def test_calibration_measures_what_is_parked_once_and_caps_it():
    toy = Toy(fits=16)
    engine = engine_of(toy)
    engine.add(toy_run(toy, "a", 3))
    engine.step()
    engine.calibrate()
    measured = len(toy.batches)
    engine.calibrate()

    assert len(toy.batches) == measured
    assert max(engine.batcher.curves["toy", (4,)]) <= 16
    assert engine.batcher.limits["toy", (4,)] == 16
    assert finish(engine) == ["a"]
