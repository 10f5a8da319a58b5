"""Encodings: what text encoders returned, kept for the next call of equal content; the empty prompt is encoded once."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Any

import torch

from worker.engine.call import Call, fingerprint

MOST_BYTES = 256 * 2**20
Key = tuple[str, bool, Hashable]  # module, whether the run is reproducible, content of the arguments
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Encodings:
    """The least recently used go first when they take more than `most_bytes`.

    What is kept is a copy, and what is handed out is another, so that no pipeline can change it in place.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """A copy of what was kept, None for what was not."""
        if key is None or key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return copied(self._kept[key][0])

    def put(self, key: Key | None, output: Any) -> None:
        """Keep a copy, where there is a key and room for it."""
        size = _bytes(output)
        if key is None or key in self._kept or not 0 < size <= self.most_bytes:
            return
        self._kept[key] = copied(output), size
        self.bytes += size
        while self.bytes > self.most_bytes:
            self.bytes -= self._kept.popitem(last=False)[1][1]

    def forget(self, names: Collection[str]) -> None:
        """Keep nothing of the modules called `names`."""
        for key in [key for key in self._kept if isinstance(key, tuple) and key[0] in names]:
            self.bytes -= self._kept.pop(key)[1]


def key_of(call: Call) -> Key | None:
    """Equal for calls that return the same; None for those that nobody can compare, as one that fills a cache.

    A reproducible run's encoding was computed alone, to the bit; another's may have been computed in company.
    """
    if not call.target.is_encoder:
        return None
    try:
        return call.name, call.run.reproducible, _content(call.kwargs)
    except TypeError:
        return None


def _content(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return fingerprint(value)
    if isinstance(value, dict):
        return "dict", tuple((k, _content(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return type(value), tuple(_content(v) for v in value)
    if isinstance(value, PLAIN):
        return type(value), value
    raise TypeError(f"{type(value).__name__} has no content to compare")


def copied(output: Any) -> Any:
    """The same, of its own memory."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, dict):
        return type(output)(**{k: copied(v) for k, v in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(copied(v) for v in output)
    return copy.copy(output)


def _bytes(output: Any) -> int:
    if isinstance(output, torch.Tensor):
        return output.nbytes
    inner = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return sum(_bytes(v) for v in inner)
