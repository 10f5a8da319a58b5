"""`safelight models ...`, as an operator runs it; the hub is a server here that speaks its protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from app.cli import commands
from app.core.catalog import load_catalog
from tests.conftest import CATALOG
from tests.unit.test_model_check import WEIGHTS, safetensors, write

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A catalog of one model, `tiny`, whose folder is good."""
    file = tmp_path / "models.toml"
    file.write_text(CATALOG.format(name="tiny", default="true"))
    a_model(tmp_path / "tiny")
    monkeypatch.setenv("SAFELIGHT_MODELS", str(file))
    return tmp_path


def a_model(folder):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    write(folder / "model_index.json", index)
    write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel"})
    return safetensors(folder / "unet" / WEIGHTS, **{"down.to_q.weight": (8, 8)})


def run(*arguments):
    return CliRunner().invoke(commands, ["models", *map(str, arguments)])


def test_the_list_says_what_and_where_and_how_large(place):
    found = run("list")

    assert found.exit_code == 0
    assert found.output.split() == ["tiny", "folder", "0.0MB", str(place / "tiny"), "default"]


def test_check_is_silent_about_nothing_and_fails_for_one_bad_file(place):
    good = run("check")
    (place / "tiny" / "extra.ckpt").write_bytes(b"")
    bad = run("check", "tiny")

    assert (good.exit_code, good.output) == (0, "tiny: good: StableDiffusionPipeline, 0.0MB\n")
    assert bad.exit_code == 1
    assert "extra.ckpt could run code" in bad.output


def test_check_names_an_adapter_of_another_base_model(place):
    file = safetensors(
        place / "a.safetensors", **{"unet.down.to_q.lora_A.weight": (4, 9), "unet.down.to_q.lora_B.weight": (8, 4)}
    )
    with (place / "models.toml").open("a") as opened:
        opened.write(f'[models.tiny.loras.a]\nsource = "{file}"\n')
    found = run("check")

    assert found.exit_code == 1
    assert "adapter a" in found.output


def test_a_folder_is_added_with_its_weights_pinned(place):
    weights = a_model(place / "new")
    found = run("add", "new", place / "new")
    spec = load_catalog(place / "models.toml").get("new")

    assert found.exit_code == 0, found.output
    assert spec.sha256 == {f"unet/{WEIGHTS}": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert (spec.defaults.width, spec.defaults.scheduler) == (512, "dpmpp_2m")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert run("check", "new").exit_code == 1


def test_a_single_file_is_added_with_its_configuration(place):
    file = safetensors(place / "one.safetensors", a=(2, 2))
    assert run("add", "one", file, "--config", place / "tiny").exit_code == 0

    spec = load_catalog(place / "models.toml").get("one")
    assert spec.config == place / "tiny"
    assert spec.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(("arguments", "match"), [(("tiny",), "already"), (("new", "--revision", "main"), "revision")])
def test_what_cannot_be_added_leaves_the_catalog_as_it_was(place, arguments, match):
    name, *options = arguments
    before = (place / "models.toml").read_text()
    found = run("add", name, "owner/model", *options)

    assert found.exit_code
    assert match in str(found.exception)
    assert (place / "models.toml").read_text() == before


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        ("new", ("--revision", REVISION), "--revision is of a hub repository"),
        ("owner/model", ("--revision", REVISION, "--config", "tiny"), "--config is of a single file"),
        ("absent.safetensors", ("--config", "tiny"), "mend the path"),
    ],
)
def test_an_option_of_another_kind_of_source_is_refused(place, monkeypatch, source, options, match):
    monkeypatch.chdir(place)
    a_model(place / "new")
    found = run("add", "new", source, *options)

    assert found.exit_code == 2
    assert match in " ".join(found.output.split())


class Hub(BaseHTTPRequestHandler):
    """The hub's protocol, for the repository owner/model whose files lie in `root`."""

    root: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/model/"):
            names = [str(f.relative_to(self.root)) for f in sorted(self.root.rglob("*")) if f.is_file()]
            about = {"id": "owner/model", "sha": REVISION, "siblings": [{"rfilename": name} for name in names]}
            tree = [{"type": "file", "path": n, "oid": n, "size": (self.root / n).stat().st_size} for n in names]
            return self.answer(json.dumps(tree if "/tree/" in path else about).encode())
        file = self.root / path.removeprefix(f"/owner/model/resolve/{REVISION}/")
        if not file.is_file():
            return self.send_error(404)
        if self.command == "GET":
            self.asked.append(file.name)
        return self.answer(file.read_bytes())

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *about):
        pass


@pytest.fixture
def hub(tmp_path):
    class Own(Hub):
        root, asked = tmp_path / "repository", []

    a_model(Own.root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Own, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("is_poisoned", [False, True])
def test_a_repository_is_added_at_its_revision_without_its_pickles_and_refused_if_poisoned(place, hub, is_poisoned):
    served, url = hub
    (served.root / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    (served.root / "big.safetensors").write_bytes(b"no component's")
    if is_poisoned:
        write(served.root / "unet" / "config.json", {"auto_map": {"AutoModel": "x.Y"}})
    command = [str(Path(sys.executable).with_name("safelight")), "models", "add", "new", "owner/model"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    about = {"HF_ENDPOINT": url, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [*command, "--revision", REVISION],
        check=False,
        env=inherited | about,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert sorted(set(served.asked)) == ["config.json", WEIGHTS, "model_index.json"], done.stderr
    if is_poisoned:
        assert done.returncode
        assert "code of its own" in done.stderr
        assert "new" not in load_catalog(place / "models.toml").models
    else:
        assert done.returncode == 0, done.stderr
        spec = load_catalog(place / "models.toml").get("new")
        assert (spec.hub, spec.revision) == ("owner/model", REVISION)
