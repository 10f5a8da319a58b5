"""Weights: what a safetensors file says it holds, read without loading any of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from app.core.errors import ModelRefused

MOST_HEADER: Final = 100_000_000  # bytes, as the format's own reader has it
BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's type, in the format's spelling, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def count(self) -> int:
        return prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name. Raises ModelRefused for what is none (format: its README)."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size - 8 - length
            if not 2 <= length <= MOST_HEADER or size < 0:
                raise ModelRefused(f"{file} is no safetensors file: its header has {length} bytes")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise ModelRefused(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{file} is no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelRefused(f"{file} is no safetensors file: its header is no table")
    return {name: _info(name, entry, size, file) for name, entry in header.items() if name != "__metadata__"}


def _info(name: str, entry: Any, size: int, file: Path) -> TensorInfo:
    try:
        info = TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
        start, stop = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelRefused(f"{file}: {name[:80]!r} has no dtype, shape and data_offsets") from error
    wanted = info.count * BITS.get(info.dtype, 8 * (stop - start) // max(info.count, 1)) // 8
    if min(info.shape, default=0) < 0 or not 0 <= start <= stop <= size or stop - start != wanted:
        raise ModelRefused(f"{file}: {name[:80]!r} lies outside the file or has another size than it says")
    return info


def bytes_in_memory(files: Iterable[Path], itemsize: int) -> int:
    """What the tensors of `files` take once loaded: floating point numbers `itemsize` each, others as stored."""
    infos = [info for file in files for info in read_header(file).values()]
    return sum(i.count * (itemsize if i.is_floating_point else BITS.get(i.dtype, 8) // 8) for i in infos)
