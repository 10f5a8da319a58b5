"""Call: one call of a warm module, parked; what it can be merged with, merging its arguments, splitting the results.

The rule: tensors whose first dimension is the call's row count are concatenated, dicts, lists and tuples are walked
into, and everything else has to be equal; calls for which it is not belong to different batches.
"""

import copy
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its name everywhere
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from worker.engine.run import Run
from worker.engine.target import Target

# Flux and CogVideoX hand over positions for the whole batch, whatever the first dimension says: Flux2 takes row 0 of a
# (rows, tokens, 4) tensor (diffusers, transformer_flux2.py). They must be equal, and one of them serves all.
SHARED = frozenset({"img_ids", "txt_ids", "image_rotary_emb"})
TIMESTEPS = frozenset({"timestep", "timesteps", "t"})
TEXT_TOKENS = 64  # the shortest length that texts are filled up to; the others are its doubles

_fingerprints: WeakIdKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows a call has; `listed` when its samples come as a list of tensors (Z-Image) instead of one tensor."""

    count: int
    listed: bool = False
    sample: torch.Tensor | None = field(default=None, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        if self.sample is None:
            return ()
        return tuple(self.sample.shape if self.listed else self.sample.shape[1:])


@dataclass(slots=True, eq=False)
class Call:
    """`key` is equal for calls that may share a forward."""

    run: Run
    name: str
    target: Target
    kwargs: dict[str, Any]
    layout: Rows
    key: Hashable

    @property
    def rows(self) -> int:
        return self.layout.count

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def is_denoiser(self) -> bool:
        return self.target.is_denoiser


def park(run: Run, name: str, target: Target, kwargs: dict[str, Any]) -> Call:
    """The call `target(**kwargs)` of `run`, with timesteps expanded to one per row."""
    kwargs = {k: v for k, v in kwargs.items() if k not in target.ignored}
    if target.padded:
        kwargs = fill_up(kwargs, *target.padded)
    rows = find_rows(kwargs)
    kwargs = {k: expand(k, v, rows.count) for k, v in kwargs.items()}
    # What a forward pads by the longest of its rows would change a reproducible run's bits with its company.
    ragged = frozenset[str]() if run.reproducible else target.ragged
    # The sum over a taller stack is rounded otherwise, so a reproducible run's company has stacks as tall as its own.
    stack = len(run.adapters) if run.reproducible and target.adapters else 0
    tiling = run.tiling and bool(target.convolutions)
    return Call(run, name, target, kwargs, rows, (name, stack, tiling, signature(kwargs, rows, ragged=ragged)))


def fill_up(kwargs: dict[str, Any], text: str, mask: str) -> dict[str, Any]:
    """The text embeddings with zeros after them, masked out, up to the next length that many texts share.

    The length follows from the call alone and not from its company, so a reproducible run's bits stay its own.
    """
    embeds, seen = kwargs.get(text), kwargs.get(mask)
    if not isinstance(embeds, torch.Tensor):
        return kwargs
    rows, tokens = embeds.shape[:2]
    missing = TEXT_TOKENS * 2 ** max((tokens - 1).bit_length() - (TEXT_TOKENS - 1).bit_length(), 0) - tokens
    if seen is None:
        seen = torch.ones(rows, tokens, dtype=torch.bool, device=embeds.device)
    filled = {text: F.pad(embeds, (0, 0, 0, missing)), mask: F.pad(seen.bool(), (0, missing))}
    return kwargs | filled


def find_rows(kwargs: dict[str, Any]) -> Rows:
    """The rows of a call: those of the sample, in every diffusers model its first tensor of two dimensions or more."""
    for value in kwargs.values():
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            return Rows(value.shape[0], sample=value)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return Rows(len(value), listed=True, sample=value[0])
    return Rows(1)


def expand(name: str, value: Any, rows: int) -> Any:
    """One timestep for every row; an integer one as float32, which is exact and what the embeddings compute in."""
    if name not in TIMESTEPS or not isinstance(value, torch.Tensor) or value.ndim > 1:
        return value
    if value.ndim == 0:
        return value.to(torch.float32).expand(rows)
    return value if value.is_floating_point() else value.to(torch.float32)


def signature(value: Any, rows: Rows, name: str = "", ragged: frozenset[str] = frozenset()) -> Hashable:
    """Equal for values that `merge` may merge."""
    if isinstance(value, torch.Tensor):
        is_per_row = _is_per_row(value, rows, name)
        return ("rows", value.shape[1:], value.dtype, value.device) if is_per_row else ("same", fingerprint(value))
    if isinstance(value, dict):
        return "dict", tuple((k, signature(v, rows, k, ragged)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        if _is_row_list(value, rows, name):
            return "each", frozenset(_element(v, name, is_ragged=name in ragged) for v in value)
        return type(value), tuple(signature(v, rows, name) for v in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    return "object", id(value)  # a generator, a cache: nobody else's


def _element(value: Any, name: str, *, is_ragged: bool) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.ndim if is_ragged else value.shape, value.dtype, value.device
    return signature(value, Rows(-1), name)


def _is_per_row(value: torch.Tensor, rows: Rows, name: str) -> bool:
    return value.ndim > 0 and value.shape[0] == rows.count and name not in SHARED


def _is_row_list(value: Any, rows: Rows, name: str = "") -> bool:
    """Whether it is a list of one thing per row, rather than per layer (ControlNet's residuals) or per adapter."""
    if not isinstance(value, list) or not value or len(value) != rows.count or name in SHARED:
        return False
    if isinstance(value[0], torch.Tensor):
        return rows.listed or not all(_is_per_row(v, rows, name) for v in value)
    return isinstance(value[0], list | tuple)  # QwenImage's img_shapes; a list of plain numbers is an option


def fingerprint(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors of equal content; read once per tensor object, because on a GPU reading is a sync."""
    if tensor not in _fingerprints:
        plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = plain.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
        digest = hashlib.blake2b(flat.tobytes(), digest_size=16).digest()
        _fingerprints[tensor] = (tensor.shape, tensor.dtype, tensor.device, digest)
    found: Hashable = _fingerprints[tensor]
    return found


def merge(calls: Sequence[Call], padding: int = 0) -> dict[str, Any]:
    """The keyword arguments of one forward for all `calls`, which have one key; `padding` repeats the last row.

    Containers are always new ones, because some models pop from those they are given.
    """
    merged: dict[str, Any] = _merge([c.kwargs for c in calls], [c.layout for c in calls], padding)
    return merged


def _merge(values: list[Any], rows: list[Rows], padding: int, name: str = "") -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if not _is_per_row(first, rows[0], name) or (len(values) == 1 and not padding):
            return first
        return torch.cat([*values, values[-1][-1:].expand(padding, *first.shape[1:])])
    if isinstance(first, dict):
        return {k: _merge([v[k] for v in values], rows, padding, k) for k in first}
    if _is_row_list(first, rows[0], name):
        return [element for value in values for element in value] + [values[-1][-1]] * padding
    if isinstance(first, list | tuple):
        return _like(first, [_merge(list(column), rows, padding, name) for column in zip(*values, strict=True)])
    return first


def part(call: Call, start: int, stop: int) -> Call:
    """The call for some of its rows."""
    kwargs = _part(call.kwargs, call.layout, slice(start, stop))
    layout = replace(call.layout, count=stop - start)
    return Call(call.run, call.name, call.target, kwargs, layout, call.key)


def _part(value: Any, rows: Rows, taken: slice, name: str = "") -> Any:
    if isinstance(value, torch.Tensor):
        return value[taken] if _is_per_row(value, rows, name) else value
    if isinstance(value, dict):
        return {k: _part(v, rows, taken, k) for k, v in value.items()}
    if _is_row_list(value, rows, name):
        return value[taken]
    return _like(value, [_part(v, rows, taken, name) for v in value]) if isinstance(value, list | tuple) else value


def join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The output of a call from those of its parts, whose rows are `sizes`: what `split` would have cut."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs)) if first.ndim and first.shape[0] == sizes[0] else first
    if isinstance(first, dict):
        return type(first)(**{k: join([output[k] for output in outputs], sizes) for k in first})
    if isinstance(first, list) and len(first) == sizes[0] and sum(map(len, outputs)) == sum(sizes):
        return [element for output in outputs for element in output]
    if isinstance(first, list | tuple):
        return _like(first, [join(column, sizes) for column in zip(*outputs, strict=True)])
    if hasattr(first, "__dict__") and not isinstance(first, torch.nn.Module | type):
        whole = copy.copy(first)
        for name in vars(first):
            object.__setattr__(whole, name, join([vars(output)[name] for output in outputs], sizes))
        return whole
    return first


def split(output: Any, sizes: Sequence[int], *, listed: bool = False) -> list[Any]:
    """The output of a forward, of its own type, once for every call; `sizes` are their rows."""
    if len(sizes) == 1:
        return [output]
    if isinstance(output, torch.Tensor):
        is_per_row = output.ndim > 0 and output.shape[0] == sum(sizes)
        return list(torch.split(output, list(sizes))) if is_per_row else [output] * len(sizes)
    if isinstance(output, dict):  # diffusers' BaseOutput and transformers' ModelOutput are dicts too
        columns = {k: split(v, sizes, listed=listed) for k, v in output.items()}
        return [type(output)(**{k: column[i] for k, column in columns.items()}) for i in range(len(sizes))]
    if isinstance(output, list | tuple):
        return _split_list(output, sizes, listed=listed)
    if hasattr(output, "__dict__") and not isinstance(output, torch.nn.Module | type):
        return _split_object(output, sizes)  # a VAE's DiagonalGaussianDistribution
    return [output] * len(sizes)


def _split_list(output: Any, sizes: Sequence[int], *, listed: bool) -> list[Any]:
    if _is_row_list(output, Rows(sum(sizes), listed)):
        ends = list(accumulate(sizes))
        return [output[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    parts = [split(v, sizes, listed=listed) for v in output]
    return [_like(output, [part[i] for part in parts]) for i in range(len(sizes))]


def _split_object(output: Any, sizes: Sequence[int]) -> list[Any]:
    copies = [copy.copy(output) for _ in sizes]
    for name, value in vars(output).items():
        for own, part in zip(copies, split(value, sizes), strict=True):
            object.__setattr__(own, name, part)
    return copies


def _like(original: Any, elements: list[Any]) -> Any:
    """`elements` in a container of the type of `original`; a named tuple takes them one by one."""
    return type(original)(*elements) if hasattr(original, "_fields") else type(original)(elements)
