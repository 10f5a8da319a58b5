"""Model check: what a model's files may hold, looked at before anything of them is imported or read in.

Only safetensors and JSON decide what a pipeline is. Whatever could run code, lead out of the folder or differ from its
pinned hash is refused: pickles by name and by content, modules, configurations that ask for code or for other places,
links and index files that leave the folder.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from app.core.catalog import ModelSpec
from app.core.errors import ModelRefused
from app.core.weights import bytes_in_memory, read_header

EXECUTABLE: Final = frozenset(
    f".{name}"
    for name in (
        *("bin", "ckpt", "pt", "pth", "pt2", "ptl", "pkl", "pickle", "dill", "joblib", "mar", "npy", "npz"),
        *("py", "pyc", "pyd", "pyx", "so", "dll", "dylib", "exe", "sh", "h5", "hdf5", "keras", "egg", "whl", "zip"),
    )
)
# A pickle of any protocol with a frame of its own, and a zip, which torch.save writes; an ELF library.
MAGIC: Final = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04", b"\x7fELF")
REMOTE_CODE: Final = ("auto_map", "custom_pipeline", "trust_remote_code", "custom_pipelines")
LIBRARIES: Final = frozenset({"diffusers", "transformers"})
# Packages of diffusers.pipelines that hold components of their own (diffusers 0.42.1).
PIPELINE_MODULES: Final = frozenset(
    {
        *("audioldm2", "deepfloyd_if", "flux", "kandinsky", "kolors", "latent_diffusion", "ltx", "ltx2", "shap_e"),
        *("stable_audio", "stable_cascade", "stable_diffusion"),
    }
)
NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# transformers takes these from tokenizer_config.json before it looks into the folder itself.
VOCABULARIES: Final = frozenset({"vocab_file", "merges_file", "tokenizer_file", "spm_file"})
MOST_JSON: Final = 64 * 2**20  # bytes of a configuration
LEFT_OUT: Final = "safety_checker"  # a component that is never loaded: ours looks at finished pictures (ADR 62)
# Pipelines that give the denoiser other attention for each call, under the runs of others (diffusers 0.42.1).
MEDDLING: Final = ("PAG", "SAG", "AttendAndExcite", "Pix2PixZero", "TextToVideoZero")

_hashed: dict[tuple[int, int, int, int], str] = {}  # device, inode, size, mtime of a file -> its SHA-256


def check(spec: ModelSpec, source: Path) -> str:
    """The pipeline class's name of the model whose files lie at `source`. Raises ModelRefused.

    `source` is spec.source, or the snapshot of spec.hub, whose links may point into the cache's own blobs.
    """
    if spec.config:
        name = check_folder(spec.config)
        _check_file(source, source.parent.resolve())
        if source.suffix.lower() != ".safetensors":
            raise ModelRefused(f"{source}: a model of a single file is a .safetensors file")
        read_header(source)
    else:
        name = check_folder(source, source.parents[1] / "blobs" if spec.hub else None)
    check_hashes(source, spec.sha256)
    return name


def check_folder(folder: Path, blobs: Path | None = None) -> str:
    """The class that model_index.json names. Raises ModelRefused; links may lead to `blobs` beside `folder` itself."""
    root = folder.resolve()
    index = _read_json(root / "model_index.json")
    check_files(root, blobs.resolve() if blobs else None)
    if not isinstance(index, dict):
        raise ModelRefused(f"cannot read {folder}/model_index.json: it holds no table of components")
    for name, entry in index.items():
        if isinstance(entry, list) and not name.startswith("_"):
            _check_component(name, entry, root)
    class_name = index.get("_class_name")
    if not (isinstance(class_name, str) and NAME.fullmatch(class_name) and class_name.endswith("Pipeline")):
        raise ModelRefused(f"{folder}/model_index.json: {class_name!r} is not a pipeline class of diffusers")
    if any(name in class_name for name in MEDDLING):
        raise ModelRefused(
            f"{folder}/model_index.json: {class_name} changes its denoiser's attention in every call, and would spoil "
            "the pictures made beside it; name the plain pipeline of its kind"
        )
    return class_name


def check_files(root: Path, blobs: Path | None = None) -> None:
    """Nothing in the folder could run code or leads elsewhere; for folders of one component too, as a ControlNet's."""
    for file in _files(root, blobs):
        _check_file(file, root)
        if file.suffix == ".json" and file.name.endswith(("config.json", "index.json")):
            _check_config(_read_json(file), file)


def check_hashes(source: Path, pins: str | Mapping[str, str]) -> None:
    """Compare files with their pinned SHA-256: one text for a single file, else by path within the folder."""
    for name, wanted in ({"": pins} if isinstance(pins, str) else pins).items():
        if (found := sha256(source / name)) != wanted:
            raise ModelRefused(f"{source / name} has SHA-256 {found}, and models.toml says {wanted}")


def sha256(file: Path) -> str:
    """Hexadecimal; a file that did not change since is not read again. Raises ModelRefused."""
    try:
        with file.open("rb") as opened:
            about = os.fstat(opened.fileno())
            stamp = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
            if stamp not in _hashed:
                _hashed[stamp] = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelRefused(f"cannot read {file}: {error.strerror}") from error
    return _hashed[stamp]


def weight_files(spec: ModelSpec, source: Path) -> list[Path]:
    """The safetensors files that loading reads: of a folder those of its components, without variants and LEFT_OUT."""
    if spec.config:
        return [source]
    index = _read_json(source / "model_index.json")
    names = [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]
    return [file for name in names if name != LEFT_OUT for file in component_files(source / name)]


def component_files(folder: Path) -> list[Path]:
    """The safetensors files of one component."""
    if index := next(iter(sorted(folder.glob("*.safetensors.index.json"))), None):
        return [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    # "model.fp16.safetensors" is a variant, which is read only on demand.
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name.count(".") == 1]


def size_of(spec: ModelSpec, source: Path, itemsize: int) -> int:
    """Bytes that the model takes once loaded, with its adapters and ControlNets; a number takes `itemsize` bytes."""
    adapters = [lora.source for lora in spec.loras.values() if lora.source.is_file()]
    controlnets = [file for net in spec.controlnets.values() for file in component_files(net.source)]
    return bytes_in_memory([*weight_files(spec, source), *adapters, *controlnets], itemsize)


def _files(root: Path, blobs: Path | None) -> Iterator[Path]:
    """Every file below `root`; each link leads to a place within it, or to `blobs`."""
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        for name in sorted([*folders, *names]):
            file = Path(folder, name)
            if file.is_symlink():
                target = file.resolve()
                if not (target.is_relative_to(root) or (blobs and target.parent == blobs and target.is_file())):
                    raise ModelRefused(f"{file} is a link that leaves the folder")
            if name in names:
                yield file


def _unreadable(error: OSError) -> None:
    raise ModelRefused(f"cannot read {error.filename}: {error.strerror}") from error


def _check_file(file: Path, root: Path) -> None:
    """Neither its name nor its first bytes say that it could run code."""
    if file.suffix.lower() in EXECUTABLE:
        raise ModelRefused(f"{file} could run code when loaded; keep only safetensors and JSON in {root}")
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ModelRefused(f"{file} is no plain file")
        with file.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise ModelRefused(f"cannot read {file}: {error.strerror}") from error
    if file.suffix.lower() == ".safetensors":
        read_header(file)
    elif start.startswith(MAGIC):
        raise ModelRefused(f"{file} could run code when loaded, whatever its name: it is a pickle, a zip or a library")


def _check_config(config: Any, file: Path) -> None:
    """Nothing in a configuration, however deep, asks for code or files from elsewhere."""
    if file.name == "adapter_config.json":
        raise ModelRefused(
            f"{file}: an adapter names its base model, which may be anywhere; name it under loras instead"
        )
    if file.name.endswith(".index.json"):
        _check_weight_map(config, file)
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                _check_key(str(key), inner, file)
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _check_key(key: str, value: Any, file: Path) -> None:
    if key in REMOTE_CODE:
        raise ModelRefused(f"{file} asks for code of its own ({key}); only classes of diffusers are loaded")
    if key.endswith(("attn_implementation", "experts_implementation")):
        # "owner/name" is a kernel that transformers would fetch and run.
        named = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(name, str) and ("/" in name or ":" in name) for name in named):
            raise ModelRefused(f"{file} asks for code from elsewhere ({key} = {value!r})")
    if key in VOCABULARIES and isinstance(value, str) and Path(value).name != value:
        raise ModelRefused(f"{file}: {key} = {value!r} leads out of the folder")


def _check_weight_map(index: Any, file: Path) -> None:
    files = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(files, Mapping):
        raise ModelRefused(f"{file} holds no weight_map")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelRefused(f"{file}: weights in {name!r}; only safetensors files beside it may be named")


def _check_component(name: str, entry: list[Any], root: Path) -> None:
    """A component's library is a known one: diffusers would import whatever is named here."""
    library, class_name = entry if len(entry) == 2 else (entry, None)
    if library is None and class_name is None:
        return
    if not NAME.fullmatch(name):
        raise ModelRefused(f"{root}/model_index.json: {name!r} is no name of a component")
    if not (isinstance(library, str) and library in LIBRARIES | PIPELINE_MODULES):
        raise ModelRefused(
            f"{root}/model_index.json takes {name} from {library!r}; only diffusers and transformers may be"
        )
    if not (isinstance(class_name, str) and NAME.fullmatch(class_name)):
        raise ModelRefused(f"{root}/model_index.json: {name} is of no class ({class_name!r})")


def _read_json(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_JSON:
            raise ModelRefused(f"cannot read {file}: it is larger than {MOST_JSON} bytes")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefused(f"cannot read {file}: {error}") from error
