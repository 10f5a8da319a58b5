"""Own: a run's own copy of a warm pipeline, around the same modules."""

import copy
from functools import cache
from typing import Any

import torch


def own(pipe: Any, device: torch.device) -> Any:
    """A shallow copy whose parts may be replaced, and that knows without looking that its modules are on `device`.

    diffusers looks through every module for hooks each time a pipeline asks where it is, five times a picture: as long
    as a step of the bundled model takes (DiffusionPipeline._execution_device).
    """
    copied = copy.copy(pipe)
    kind: type = type(pipe)
    copied.__class__ = _settled(kind)
    vars(copied)["_settled_on"] = device
    return copied


@cache
def _settled(kind: type) -> type:
    there = property(lambda self: self._settled_on)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "device": there, "_execution_device": there})
