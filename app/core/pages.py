"""Pages: an environment in which the C library asks for huge pages, of which a forward's tensors take fewer."""

from collections.abc import Mapping
from typing import Final

TUNABLES: Final = "GLIBC_TUNABLES"
HUGE: Final = "glibc.malloc.hugetlb"  # 1: madvise, where the kernel leaves it to that (glibc 2.35)


def huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that computes; what it says itself of huge pages stays."""
    given = environment.get(TUNABLES, "")
    if HUGE in given:
        return dict(environment)
    return {**environment, TUNABLES: ":".join(filter(None, [given, f"{HUGE}=1"]))}
