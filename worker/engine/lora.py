"""Lora: low-rank adapters by the row; in one forward each row has a stack of its own, with its own weights.

A layer's output gets weight * up(down(x)) for every adapter of the row: two batched products a layer, whatever the
number of adapters. Peft knows one adapter a row and one scale an adapter, and computes adapter by adapter.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  # its name everywhere

Stack = tuple[tuple[str, float], ...]  # adapter, weight
CACHED = 2  # batches whose gathered matrices are kept: a batch changes only when a run joins or leaves


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter does to one layer, its alpha / rank included in `up`.

    `down` is (rank, in) or, for a convolution, (rank, in, height, width); `up` is (out, rank).
    """

    down: torch.Tensor
    up: torch.Tensor


Layers = Mapping[str, LowRank]  # by the name of the layer within its model


class Adapters:
    """All adapters of one module, in memory at once. `using` says which row gets which, for one forward."""

    def __init__(self, module: torch.nn.Module, adapters: Mapping[str, Layers]) -> None:
        names = sorted({name for layers in adapters.values() for name in layers})
        self._layers = {name: _Layer(module.get_submodule(name), name, adapters) for name in names}
        self._gathered: OrderedDict[tuple[Stack, ...], dict[str, LowRank]] = OrderedDict()
        self._active: dict[str, LowRank] | None = None
        self._undo = [
            layer.module.register_forward_hook(partial(self._add, name)) for name, layer in self._layers.items()
        ]

    @contextmanager
    def using(self, stacks: Sequence[Stack]) -> Iterator[None]:
        """Row i of the forward within gets the adapters stacks[i]."""
        self._active = self._gather(tuple(stacks)) if any(stacks) else None
        try:
            yield
        finally:
            self._active = None

    @property
    def nbytes(self) -> int:
        return sum(layer.downs.nbytes + layer.ups.nbytes for layer in self._layers.values())

    def to(self, device: torch.device) -> None:
        """Follow the module to another device; no forward is under way."""
        self._gathered.clear()
        for layer in self._layers.values():
            layer.downs, layer.ups = layer.downs.to(device), layer.ups.to(device)

    def close(self) -> None:
        """Leave the module as it was."""
        while self._undo:
            self._undo.pop().remove()

    def _gather(self, stacks: tuple[Stack, ...]) -> dict[str, LowRank]:
        if stacks not in self._gathered:
            while len(self._gathered) >= CACHED:
                self._gathered.popitem(last=False)
            named = {name for stack in stacks for name, _ in stack}
            touched = {name: layer for name, layer in self._layers.items() if not named.isdisjoint(layer.slots)}
            self._gathered[stacks] = {name: layer.gather(stacks) for name, layer in touched.items()}
        self._gathered.move_to_end(stacks)
        return self._gathered[stacks]

    def _add(
        self, name: str, _module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """The forward hook of one layer; None leaves its output as it is."""
        if self._active is None or name not in self._active:
            return None
        return self._layers[name].add(args[0], output, self._active[name])


class _Layer:
    """Every adapter's matrices for one layer, filled up to the largest rank; slot 0 holds none."""

    def __init__(self, module: torch.nn.Module, name: str, adapters: Mapping[str, Layers]) -> None:
        assert isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        self.module = module
        self.name = name
        own = {adapter: layers[name] for adapter, layers in adapters.items() if name in layers}
        self.slots = {adapter: slot for slot, adapter in enumerate(own, start=1)}
        rank = max(low.up.shape[1] for low in own.values())
        example = next(iter(own.values()))
        self.downs = module.weight.new_zeros(len(own) + 1, rank, *example.down.shape[1:])
        self.ups = module.weight.new_zeros(len(own) + 1, rank, example.up.shape[0])
        for slot, low in enumerate(own.values(), start=1):
            self.downs[slot, : low.down.shape[0]] = low.down.to(self.ups)
            self.ups[slot, : low.up.shape[1]] = low.up.T.to(self.ups)

    def gather(self, stacks: tuple[Stack, ...]) -> LowRank:
        """A row's adapters one below the other: (rows, stack * rank, in) and (rows, stack * rank, out)."""
        width = max(len(stack) for stack in stacks)
        slots, weights = torch.zeros(len(stacks), width, dtype=torch.long), torch.zeros(len(stacks), width)
        for row, stack in enumerate(stacks):
            for place, (adapter, weight) in enumerate(stack):
                slots[row, place], weights[row, place] = self.slots.get(adapter, 0), weight
        slots, weights = slots.to(self.ups.device), weights.to(self.ups)
        return LowRank(self.downs[slots].flatten(1, 2), (self.ups[slots] * weights[..., None, None]).flatten(1, 2))

    def add(self, x: torch.Tensor, output: torch.Tensor, low: LowRank) -> torch.Tensor:
        """`output`, plus what the adapters of each row add to it."""
        rows = low.up.shape[0]
        if x.shape[0] != rows:  # another order of rows would be another request's adapter
            raise ValueError(f"{self.name} computes {x.shape[0]} rows of {rows}: no adapter can be told its row there")
        if isinstance(self.module, torch.nn.Linear):
            inner = torch.bmm(x.reshape(rows, -1, x.shape[-1]), low.down.transpose(1, 2))
            return torch.baddbmm(output.reshape(rows, -1, output.shape[-1]), inner, low.up).view_as(output)
        inner = self._convolve(x, low.down)
        return torch.baddbmm(output.flatten(2), low.up.transpose(1, 2), inner).view_as(output)

    def _convolve(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Each row by its own kernels, as one convolution in groups: (rows, stack * rank, pixels)."""
        conv = self.module
        assert isinstance(conv, torch.nn.Conv2d)
        padding = conv.padding
        if conv.padding_mode == "circular":  # of a run that tiles
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode="circular")  # noqa: SLF001  # as torch does it
            padding = (0, 0)
        joined = x.reshape(1, -1, *x.shape[2:])
        inner = F.conv2d(joined, down.flatten(0, 1), None, conv.stride, padding, conv.dilation, groups=len(down))
        return inner.view(*down.shape[:2], -1)
