"""Hub: the files of a repository at a pinned revision, and no other files than a pipeline is loaded from."""

import json
from pathlib import Path
from typing import Any, Final

from app.core.errors import ConfigError

CONFIGS: Final = ("*.json", "*.txt", "*.model", "*.jinja")  # of tokenizers, models and schedulers
VARIANTS: Final = ("*.fp16.*", "*.bf16.*", "*.fp32.*", "*non_ema*", "openvino*", "flax*")


def fetch(repository: str, revision: str, *, only_local: bool = False) -> Path:
    """The folder of `repository` at `revision`, downloaded unless `only_local`. Raises ConfigError.

    Pickles and modules are left where they are. What was downloaded is for model_check to judge.
    """
    try:
        # Imported here: the API needs no hub, and its image has no client of it.
        from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"cannot get {repository}: huggingface_hub is not installed; install safelight[worker]"
        ) from error
    about: dict[str, Any] = {"revision": revision, "local_files_only": only_local}
    try:
        index = Path(hf_hub_download(repository, "model_index.json", **about))
        wanted = ["model_index.json", *_patterns(index)]
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=list(VARIANTS), **about))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these
        where = "is not in the hub's cache here" if only_local else "cannot be had from the hub"
        raise ConfigError(f"{repository} at {revision} {where}: {error}") from error


def _patterns(index: Path) -> list[str]:
    """The files of the components that model_index.json names."""
    entries = json.loads(index.read_text(encoding="utf-8"))
    names = [name for name, entry in entries.items() if isinstance(entry, list) and not name.startswith("_")]
    return [f"{name}/{kind}" for name in names for kind in (*CONFIGS, "*.safetensors")]
