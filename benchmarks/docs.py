"""Docs: docs/benchmarks.md from what lies in benchmarks/results/. `python -m benchmarks.docs`"""

import json
from pathlib import Path

from benchmarks.results import FOLDER, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
ORDER = (
    "saturated",
    "against_litserve_identical",
    "against_litserve_mixed",
    "engine_alone",
    "short_jobs",
    "gpu_sd15",
    "gpu_sdxl",
    "gpu_flux",
)
MARK = "<!-- What follows is written by `python -m benchmarks.docs`. -->"


def fill(page: Path = PAGE, folder: Path = FOLDER) -> None:
    """Write the tables of all results under the mark; what stands above it is by hand."""
    head = page.read_text().partition(MARK)[0]
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    parts = [_section(found[name]) for name in ORDER if name in found]
    page.write_text(f"{head}{MARK}\n\n" + "\n".join(parts))


def _section(result: dict) -> str:
    said = [f"- {'Met' if holds else 'Not met'}: {sentence}." for sentence, holds in result["checks"]]
    when = f"seed {result['seed']}; {result['at']}; load average {result['load'][0]:.1f}"
    lines = [
        f"## {result['title']}",
        "",
        f"`{result['command']}` ({when}; {result['machine']})",
        "",
        *table(result["columns"], result["rows"]),
        "",
        *[line for note in result["notes"] for line in (note, "")],
        *said,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    fill()
