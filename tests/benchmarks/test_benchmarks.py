"""The benchmarks in small: every server is started and driven, and what they print holds together."""

import json
import os
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import docs, workload
from benchmarks.results import Result

ROOT = Path(__file__).resolve().parents[2]


def run(module, *arguments, results, status=0):
    """The JSON of a benchmark that was run with these arguments."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SAFELIGHT_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *arguments, "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == status, done.stderr[-3000:]
    print(done.stdout)
    return {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}


def test_requests_and_arrivals_are_drawn_by_their_seed():
    assert workload.mixed(64, 1) == workload.mixed(64, 1) != workload.mixed(64, 2)
    drawn = workload.mixed(500, 3)
    assert {w.scheduler for w in drawn} == set(workload.SCHEDULERS)
    assert {w.num_inference_steps for w in drawn} == set(range(8, 31))
    assert len({(w.num_inference_steps, w.guidance_scale, w.scheduler) for w in workload.identical(64, 1)}) == 1
    times = list(islice(workload.poisson(5.0, 4), 4000))
    assert times == sorted(times)
    assert mean(b - a for a, b in pairwise(times)) == pytest.approx(0.2, rel=0.1)


def test_saturated_in_small(tmp_path):
    found = run("saturated", "--requests", "3", "--rounds", "1", "--repeats", "1", results=tmp_path)["saturated"]
    assert found["rows"][0][0] == "Safelight"
    ours = found["figures"]["ours"][0]
    assert ours["rows"] == workload.denoiser_rows(workload.mixed(3, found["seed"]))
    assert 0 < ours["denoiser"] + ours["others"] < ours["seconds"]
    assert ours["rows"] / ours["forwards"] > 2


def test_against_litserve_in_small_and_on_from_where_it_stopped(tmp_path):
    asked = ["mixed", "--requests", "3", "--size", "2"]
    state = tmp_path / "against_litserve_mixed.partial"
    state.write_text(json.dumps({"asking": [3, 4711, 1, 2], "size": 2, "rates": {}, "pairs": [[1.0, 9.0]]}))
    found = run("against_litserve", *asked, "--pairs", "2", results=tmp_path)["against_litserve_mixed"]
    assert found["figures"]["pairs"][0] == [1.0, 9.0]
    assert len(found["figures"]["pairs"]) == 2
    assert min(found["figures"]["pairs"][1]) > 0
    assert not state.exists()


def test_short_jobs_in_small(tmp_path):
    asked = ["--seconds", "3", "--solo", "3", "--step", "0.03", "--row", "0.006"]
    found = run("short_jobs", *asked, results=tmp_path)["short_jobs"]
    assert [row[0] for row in found["rows"]] == ["4", "50"]
    took = found["figures"]["took"]
    assert len(took) > 5
    assert all(seconds > steps * 0.03 for _, steps, seconds in took)


def test_the_gpu_benchmark_on_a_cpu_at_small_sizes(tmp_path):
    asked = ["--size", "tiny", "--device", "cpu", "--rows", "1", "2", "--modes", "eager", "graphs", "--images", "4"]
    found = run("gpu", *asked, results=tmp_path)
    assert set(found) == {"gpu_sd15_tiny", "gpu_sdxl_tiny", "gpu_flux_tiny"}
    for result in found.values():
        assert list(result["figures"]["t"]) == ["eager"]  # graphs are CUDA's
        assert result["figures"]["images/s eager"] > 0


def test_the_page_is_filled_from_the_results_and_keeps_what_is_by_hand(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# By hand\n\n{docs.MARK}\nold\n")
    result = Result("short_jobs", "A title", 7, ["a", "b"], command="python -m benchmarks.short_jobs")
    result.row("x", 1)
    result.check("1.00x, at most 2", holds=True)
    result.save(tmp_path)
    docs.fill(page, tmp_path)
    text = page.read_text()
    assert text.startswith("# By hand")
    assert "old" not in text
    assert "| x | 1 |" in text
    assert "`python -m benchmarks.short_jobs` (seed 7" in text
    assert "- Met: 1.00x, at most 2." in text
