"""A training that can be stopped at any moment and goes on where it stopped."""

from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """The state of one training in one file: modules, their running averages, the optimiser, the step and the seed."""

    def __init__(self, file: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.file, self.modules, self.optimizer = file, modules, optimizer
        self.step = 0
        self.averages = {k: {n: p.detach().clone() for n, p in m.state_dict().items()} for k, m in modules.items()}

    def load(self) -> None:
        """Read the file if there is one."""
        if not self.file.exists():
            return
        saved = torch.load(self.file, weights_only=True)
        self.step, self.averages = saved["step"], saved["averages"]
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, module in self.modules.items():
            module.load_state_dict(saved["modules"][name])

    def save(self) -> None:
        """Write the file; a crash in the middle leaves the one before."""
        body: dict[str, Any] = {
            "step": self.step,
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
        }
        part = self.file.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(body, part)
        part.replace(self.file)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the running averages; early steps count less, so that a short run is not its own random start."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for name, module in self.modules.items():
            mean = self.averages[name]
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    mean[key].lerp_(value, 1 - decay)

    def load_averages(self) -> None:
        """Put the running averages into the modules: what is exported and evaluated."""
        for name, module in self.modules.items():
            module.load_state_dict(self.averages[name])
