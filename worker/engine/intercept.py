"""Intercept: a warm module's method, on the instance, hands its calls to the engine; class and config stay as they are.

A stand-in object in the module's place would fail the isinstance checks of pipelines (ControlNet's, for one).
"""

import inspect
from collections.abc import Callable
from typing import Any

from worker.engine.target import Target


def intercept(target: Target, is_run: Callable[[], bool], park: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    """Send the calls made by a run to `park`, as keyword arguments; all others pass through. Returns what undoes it."""
    module, method, original = target.module, target.method, target.original
    names = positional(original)
    before = vars(module).get(method)  # accelerate's hooks sit on the instance too

    def parked(*args: Any, **kwargs: Any) -> Any:
        if not is_run() or len(args) > len(names):
            return original(*args, **kwargs)
        return park(dict(zip(names, args, strict=False)) | kwargs)

    def undo() -> None:
        if before is None:
            delattr(module, method)
        else:
            setattr(module, method, before)

    setattr(module, method, parked)
    return undo


def positional(method: Callable[..., Any]) -> list[str]:
    """The names of the arguments that may be given by position."""
    parameters = inspect.signature(method).parameters
    return [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
