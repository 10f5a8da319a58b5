"""`safelight models ...`: what the catalog holds, whether it may be loaded, and adding to it."""

import json
import sys
from pathlib import Path
from typing import Any, Final

import click

from app.core import hub, lora_check, model_check
from app.core.catalog import ModelSpec, load_catalog
from app.core.errors import ConfigError, ModelRefused
from app.core.settings import load_settings

SHOWN_ITEMSIZE: Final = 2  # bytes of a number, for the size that is shown: bfloat16, as on a GPU
# What a new entry gets, by what its pipeline's name begins with; the operator edits models.toml from there.
KINDS: Final[dict[str, dict[str, Any]]] = {
    "StableDiffusionXL": {
        "side": 1024,
        "steps": 30,
        "guidance": 5.0,
        "schedulers": ["euler", "dpmpp_2m_karras", "ddim"],
    },
    "StableDiffusion3": {"side": 1024, "steps": 28, "guidance": 5.0, "schedulers": ["flow_euler"]},
    "StableDiffusion": {"side": 512, "steps": 30, "guidance": 7.0, "schedulers": ["dpmpp_2m", "euler", "ddim"]},
    "Flux": {"side": 1024, "steps": 28, "guidance": 3.5, "schedulers": ["flow_euler"], "accepts": ["guidance_scale"]},
    "": {"side": 1024, "steps": 28, "guidance": 5.0, "schedulers": ["flow_euler"]},
}


@click.group()
def models() -> None:
    """List, check and add models. The catalog is the file that SAFELIGHT_MODELS names."""


@models.command("list")
def list_() -> None:
    """List the models of the catalog: name, what kind of files, bytes in memory as bfloat16, where, other names."""
    for spec in load_catalog(load_settings().models).models.values():
        kind = "file" if spec.config else "folder" if spec.source else "hub"
        marks = ",".join(mark for mark, is_so in (("default", spec.default), ("pinned", spec.pinned)) if is_so)
        where = spec.source or f"{spec.hub}@{spec.revision}"
        click.echo("  ".join([spec.name, kind, _size(spec), str(where), *spec.aliases, marks]).rstrip())


@models.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def check(names: tuple[str, ...]) -> None:
    """Check the files of all models, or of those named: no pickles, no code, nothing from elsewhere, hashes as pinned.

    Nothing is loaded. Exits 1 if anything is refused.
    """
    catalog = load_catalog(load_settings().models)
    found = [_checked(catalog.get(name)) for name in names or catalog.models]
    sys.exit(0 if all(found) else 1)


def _checked(spec: ModelSpec) -> bool:
    """Print what is wrong with a model, or that nothing is."""
    problems = []
    try:
        source = _locate(spec, only_local=True)
        kind = model_check.check(spec, source)
        for name, lora in spec.loras.items():
            if problem := _adapter_problem(spec, name, source):
                problems.append(f"adapter {name} ({lora.source}): {problem}")
    except ConfigError as error:
        problems.append(error.message)
    for problem in problems:
        click.echo(f"{spec.name}: refused: {problem}", err=True)
    if not problems:
        click.echo(f"{spec.name}: good: {kind}, {_size(spec)}")
    return not problems


def _adapter_problem(spec: ModelSpec, name: str, source: Path) -> str:
    lora = spec.loras[name]
    try:
        model_check.check_hashes(lora.source, lora.sha256 or {})
        return lora_check.problem_of(lora.source, spec, source)
    except ModelRefused as error:
        return error.message


@models.command()
@click.argument("name")
@click.argument("source")
@click.option("--revision", help="Of a hub repository: the 40 hex digits of a commit.")
@click.option("--config", type=click.Path(path_type=Path), help="Of a single file: the diffusers folder of its kind.")
def add(name: str, source: str, revision: str | None, config: Path | None) -> None:
    """Add SOURCE to the catalog as NAME: a diffusers folder, one .safetensors file, or a hub repository OWNER/NAME.

    A repository is downloaded first. The files are checked, and their weights' hashes pinned. Sizes, steps and
    schedulers are those usual for its kind; edit models.toml where they are not right for this one.
    """
    file = load_settings().models
    if name in load_catalog(file).models:
        raise ConfigError(f"{file} has a model {name!r} already; choose another name, or edit the file")
    entry = _entry(source, revision, config)
    spec = ModelSpec.model_validate({"name": name, **_usual(""), **entry})
    folder = _locate(spec, only_local=False)
    entry |= _usual(model_check.check(spec, folder)) | {"sha256": _hashes(spec, folder)}
    text = _toml(name, entry)
    trial = file.with_name(f".{file.name}.new")  # beside it: what it names relative to its folder is found
    try:
        trial.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")
        load_catalog(trial)
        trial.replace(file)
    finally:
        trial.unlink(missing_ok=True)
    click.echo(f"{name} is in {file}; workers know it when they have been started again")


def _entry(source: str, revision: str | None, config: Path | None) -> dict[str, Any]:
    path = Path(source)
    if revision and path.exists():
        raise click.UsageError(f"--revision is of a hub repository, and {source} is here; leave it out")
    if config and not path.exists():
        raise click.UsageError(
            f"--config is of a single file, and {source} is none here; leave it out, or mend the path"
        )
    if path.exists():
        where: dict[str, Any] = {"source": str(path.resolve())}
        return where | ({"config": str(config.resolve())} if config else {})
    if source.count("/") != 1 or not revision:
        raise ConfigError(
            f"{source} is no file or folder here; for a hub repository give --revision, a commit's 40 digits"
        )
    return {"hub": source, "revision": revision}


def _locate(spec: ModelSpec, *, only_local: bool) -> Path:
    if spec.source:
        return spec.source
    return hub.fetch(str(spec.hub), str(spec.revision), only_local=only_local)


def _hashes(spec: ModelSpec, source: Path) -> str | dict[str, str]:
    files = model_check.weight_files(spec, source)
    if spec.config:
        return model_check.sha256(source)
    return {str(file.relative_to(source)): model_check.sha256(file) for file in files}


def _usual(class_name: str) -> dict[str, Any]:
    kind = next(about for start, about in KINDS.items() if class_name.startswith(start))
    side, schedulers = kind["side"], kind["schedulers"]
    defaults = {"width": side, "height": side, "num_inference_steps": kind["steps"], "guidance_scale": kind["guidance"]}
    found = {"schedulers": schedulers, "defaults": defaults | {"scheduler": schedulers[0]}}
    limits = {"min_side": side // 4, "max_side": 2 * side, "multiple_of": 16, "max_pixels": side * side * 2}
    return found | {"limits": limits} | ({"accepts": kind["accepts"]} if "accepts" in kind else {})


def _toml(name: str, entry: dict[str, Any]) -> str:
    """A table and its sub-tables; JSON's texts, numbers and lists are TOML's too."""
    tables = {key: value for key, value in entry.items() if isinstance(value, dict)}
    plain = {key: value for key, value in entry.items() if key not in tables}
    lines = ["", f"[models.{json.dumps(name)}]", *(f"{key} = {_quoted(value)}" for key, value in plain.items())]
    for table, values in tables.items():
        lines += ["", f"[models.{json.dumps(name)}.{table}]"]
        lines += [f"{_quoted(key)} = {_quoted(value)}" for key, value in values.items()]
    return "\n".join([*lines, ""])


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML knows no halves of a surrogate pair


def _size(spec: ModelSpec) -> str:
    try:
        size = model_check.size_of(spec, _locate(spec, only_local=True), SHOWN_ITEMSIZE)
    except ConfigError:
        return "?"
    return f"{size / 1e9:.1f}GB" if size >= 1e8 else f"{size / 1e6:.1f}MB"
