"""Results: what a benchmark found, as JSON and as a table in benchmarks/results/, from which the docs are filled."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


@dataclass
class Result:
    """`checks` are sentences and whether they hold; `rows` a table under `columns`."""

    name: str
    title: str
    seed: int
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    checks: list[tuple[str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    command: str = field(default_factory=lambda: " ".join(["python -m", _module(), *sys.argv[1:]]))

    def row(self, *cells: object) -> None:
        self.rows.append([str(cell) for cell in cells])

    def check(self, sentence: str, *, holds: bool) -> None:
        self.checks.append((sentence, bool(holds)))

    @property
    def text(self) -> str:
        """The result as Markdown."""
        head = [f"## {self.title}", "", f"`{self.command}` (seed {self.seed})", ""]
        said = [f"- {'met' if holds else 'NOT MET'}: {sentence}" for sentence, holds in self.checks]
        parts = [*head, *table(self.columns, self.rows), "", *self.notes, *([""] if self.notes else []), *said]
        return "\n".join(parts) + "\n"

    def save(self, folder: Path = FOLDER) -> None:
        """Print it, and write NAME.json and NAME.md."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            **vars(self),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "load": os.getloadavg(),
        }
        (folder / f"{self.name}.json").write_text(json.dumps(about, indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(self.text)
        print(self.text, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {device}, Python {platform.python_version()}, torch {torch.__version__}"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
