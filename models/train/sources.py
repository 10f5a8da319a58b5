"""The pictures and words the bundled model learns from: fetched from the npm registry, checked, unpacked."""

import hashlib
import json
import shutil
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True, slots=True)
class Package:
    """One npm package at one version; `sha256` is of the tarball."""

    name: str
    version: str
    licence: str
    sha256: str

    @property
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"

    @property
    def folder(self) -> str:
        return self.name.replace("@", "").replace("/", "-")


PICTURES = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "MIT",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
WORDS = Package(
    "emojibase-data",
    "17.0.0",
    "MIT",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "MIT",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)


def fetch(package: Package, folder: Path) -> Path:
    """Download and unpack a package once; the folder of its files. Raises ValueError when the checksum differs."""
    target = folder / package.folder
    if (target / "package").is_dir():
        return target / "package"
    with urllib.request.urlopen(package.url, timeout=120) as reply:  # noqa: S310  # a constant https address
        body = reply.read()
    found = hashlib.sha256(body).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{package.url} has sha256 {found}, expected {package.sha256}")
    archive = target.with_suffix(".tgz")
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(body)
    unpack(archive, target)
    return target / "package"


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tarball to `target`, which is there whole or not at all."""
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        # Python before 3.11.4 knows no filters; the checksum says what is in the archive.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(part)  # noqa: S202  # see the line above
    part.replace(target)


@dataclass(frozen=True, slots=True)
class Emoji:
    """One emoji of emojibase: its code point as the picture's file is called, its English name and keywords."""

    code: str
    name: str
    keywords: tuple[str, ...]
    group: int
    picture: Path


def emojis(folder: Path) -> list[Emoji]:
    """Every emoji that has both a 3D picture and English words, without skin-tone variants, in Unicode's order."""
    assets = fetch(PICTURES, folder) / "assets"
    entries = json.loads((fetch(WORDS, folder) / "en" / "data.json").read_text())
    found = []
    for entry in sorted(entries, key=lambda e: e.get("order", 1 << 30)):
        code = entry["hexcode"].lower()
        picture = next((p for p in _candidates(assets, code) if p.exists()), None)
        if picture and "group" in entry:
            words = tuple(entry.get("tags", ()))
            found.append(Emoji(picture.stem, entry["label"].lower(), words, entry["group"], picture))
    return found


def _candidates(assets: Path, code: str) -> list[Path]:
    # The pictures keep or drop the variation selector fe0f where emojibase does otherwise.
    bare = code.replace("-fe0f", "")
    return [assets / f"{c}.webp" for c in (code, bare, f"{bare}-fe0f", code.replace("-200d", "-fe0f-200d"))]
