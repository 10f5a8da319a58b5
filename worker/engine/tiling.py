"""Tiling: for one forward the convolutions see the picture's opposite edge beyond each edge, so that it has no seam.

Calls of runs that tile have keys of their own (see call.park): nobody else's rows are in such a forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def tiled(convolutions: Sequence[torch.nn.Conv2d]) -> Iterator[None]:
    """Within, these convolutions pad with what lies at the opposite edge; only one thread computes with them."""
    before = [convolution.padding_mode for convolution in convolutions]
    try:
        for convolution in convolutions:
            convolution.padding_mode = "circular"
        yield
    finally:
        for convolution, mode in zip(convolutions, before, strict=True):
            convolution.padding_mode = mode
