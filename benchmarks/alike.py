"""Alike: whoever is compared with our worker computes with its memory settings."""

import os
import sys

from app.core.pages import huge_pages


def alike() -> None:
    """Begin this process again with the worker's environment, if it has another; its children inherit it."""
    environment = huge_pages(os.environ)
    if environment != os.environ:
        os.execve(sys.executable, sys.orig_argv, environment)
