"""What can be checked of deploy/ without Docker, a cluster or a network: schemas, names, and Prometheus' own tools."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path in MANIFESTS
    for document in yaml.safe_load_all(path.read_text())
]
WORKLOADS = [p for p in DOCUMENTS if p.values[0]["kind"] in ("Deployment", "StatefulSet")]
OWN_SERVICES = ["api", "worker", "worker-gpu", "sender"]
# Settings that .env may have; left out, each is the service's own default.
ADMISSION = [
    "SAFELIGHT_WEBHOOK_ALLOW",
    "SAFELIGHT_IMAGE_ALLOW",
    "SAFELIGHT_CORS_ORIGINS",
    "SAFELIGHT_MAX_WAIT",
    "SAFELIGHT_TENANT_RATE",
    "SAFELIGHT_TENANT_BURST",
    "SAFELIGHT_TENANT_MAX_RUNNING",
    "SAFELIGHT_TENANT_MAX_WAITING",
    "SAFELIGHT_TENANT_MAX_STREAMS",
]
# ${NAME}, ${NAME:-default} and ${NAME:?message}; docker-compose.yml uses no other form.
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


def promtool(*arguments, cwd=DEPLOY / "prometheus"):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.fail("promtool is missing: apt-get install --no-install-recommends prometheus")
    done = subprocess.run([tool, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def setting_names():
    from app.core.settings import PREFIX, Settings

    return {PREFIX + name.upper() for name in Settings.model_fields}


def metric_names(text):
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsafelight_\w+", text)}


def rules():
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def expressions(dashboard):
    return [
        target["expr"] for panel in json.loads(dashboard.read_text())["panels"] for target in panel.get("targets", [])
    ]


def env_file():
    done = subprocess.run([DEPLOY / "env.sh"], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def compose_environment(service, variables):
    """The service's environment as compose fills it in. Raises KeyError for a required variable that is missing."""

    def fill(match):
        default = match["rest"] if match["kind"] == "-" else None
        return variables.get(match["name"], default) if default is not None else variables[match["name"]]

    return {name: VARIABLE.sub(fill, str(value)) for name, value in COMPOSE["services"][service]["environment"].items()}


def seconds(duration):
    return int(re.fullmatch(r"(\d+)s", duration)[1])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_manifest_follows_the_schema_of_kubernetes(document):
    kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_pod_runs_without_root_and_without_a_writable_root(workload):
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in pod["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.values[0]["metadata"]["name"] != "redis"])
def test_a_pod_has_longer_to_end_than_the_grace_it_is_configured_with(workload):
    config = next(p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == "ConfigMap")
    grace = float(config["data"]["SAFELIGHT_GRACE_SECONDS"])
    assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > grace


def test_the_api_has_room_for_its_children_that_decode_pictures():
    from app.core.image_child import MEMORY_BYTES
    from app.core.image_process import CHILDREN

    [api] = [p.values[0] for p in WORKLOADS if p.values[0]["metadata"]["name"] == "api"]
    limit = api["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Gi")) * 2**30 > CHILDREN * MEMORY_BYTES + 256 * 2**20


@pytest.mark.parametrize(
    ("given", "environment", "shown"),
    [
        ([], {"HOST": "x86_64-conda-linux-gnu"}, "127.0.0.1 8000 ./var"),
        ([], {"SAFELIGHT_HOST": "::1", "SAFELIGHT_PORT": "81", "SAFELIGHT_DATA": "/d"}, "::1 81 /d"),
        (["HOST=0.0.0.0", "PORT=9000", "DATA=x"], {"HOST": "y", "SAFELIGHT_PORT": "81"}, "0.0.0.0 9000 x"),
    ],
)
def test_make_run_takes_the_settings_of_the_environment_unless_its_own_are_given(given, environment, shown):
    clean = {name: value for name, value in os.environ.items() if name not in ("HOST", "PORT", "DATA", "MAKEFLAGS")}
    command = ["make", "-n", "--no-print-directory", "run", *given]
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True)
    host, port, data = shown.split()
    assert f"SAFELIGHT_HOST={host} SAFELIGHT_PORT={port} SAFELIGHT_DATA={data} exec" in done.stdout


@pytest.mark.parametrize("path", [ROOT / "docker-compose.yml", ROOT / "Dockerfile", DEPLOY / "env.sh", *MANIFESTS])
def test_every_setting_named_in_a_file_exists(path):
    used = set(re.findall(r"\bSAFELIGHT_[A-Z_]+", path.read_text()))
    assert used <= setting_names()


@pytest.mark.parametrize("service", OWN_SERVICES)
def test_a_service_of_compose_starts_with_settings_that_load(service, monkeypatch):
    from app.core.settings import load_settings
    from app.core.storage import open_storage

    for name, value in compose_environment(service, env_file()).items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    open_storage(settings.storage, public_url=settings.base_url, secret=b"x")


@pytest.mark.parametrize("service", OWN_SERVICES)
def test_a_setting_that_env_leaves_out_is_the_services_default_in_compose(service, monkeypatch):
    from app.core.settings import PREFIX, Settings, load_settings

    for name, value in compose_environment(service, env_file()).items():
        monkeypatch.setenv(name, value)
    found = load_settings()
    for name in ADMISSION:
        field = name.removeprefix(PREFIX).lower()
        assert getattr(found, field) == Settings.model_fields[field].default


@pytest.mark.parametrize("service", OWN_SERVICES)
@pytest.mark.parametrize("name", ADMISSION)
def test_a_setting_of_env_reaches_every_service_of_compose(service, name):
    assert compose_environment(service, env_file() | {name: "7"})[name] == "7"


@pytest.mark.parametrize("service", OWN_SERVICES)
def test_a_service_of_compose_does_not_start_without_its_key(service):
    variables = {name: value for name, value in env_file().items() if name != "SAFELIGHT_API_KEY"}
    with pytest.raises(KeyError, match="SAFELIGHT_API_KEY"):
        compose_environment(service, variables)


@pytest.mark.parametrize("service", OWN_SERVICES)
def test_a_service_of_compose_has_longer_to_end_than_its_grace(service):
    grace = float(compose_environment(service, env_file())["SAFELIGHT_GRACE_SECONDS"])
    assert seconds(COMPOSE["services"][service]["stop_grace_period"]) > grace


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_of_compose_pins_its_image(name):
    assert re.search(r":v?\d+\.\d+\.\d+", COMPOSE["services"][name]["image"])


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_of_compose_mounts_only_what_there_is(name):
    sources = [volume.split(":")[0] for volume in COMPOSE["services"][name].get("volumes", [])]
    assert [s for s in sources if s not in COMPOSE["volumes"] and not (s[0] == "." and (ROOT / s).exists())] == []


@pytest.mark.parametrize("service", OWN_SERVICES)
def test_a_service_of_compose_builds_a_target_of_the_dockerfile(service):
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert COMPOSE["services"][service]["build"]["target"] in stages


def test_compose_and_manifests_run_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    texts = [path.read_text() for path in [ROOT / "docker-compose.yml", *MANIFESTS]]
    assert {tag for text in texts for tag in re.findall(r"image: safelight/[\w-]+:(\S+)", text)} == {version}


def test_redis_syncs_every_write_evicts_nothing_and_knows_what_it_may_take():
    [manifest] = [p.values[0] for p in WORKLOADS if p.values[0]["metadata"]["name"] == "redis"]
    for container in COMPOSE["services"]["redis"], manifest["spec"]["template"]["spec"]["containers"][0]:
        command = " ".join(container["command"])
        assert "--appendonly yes --appendfsync always --maxmemory-policy noeviction --maxmemory " in command


def test_prometheus_reads_its_configuration():
    # Only the syntax: the key's file is there in the container, not here.
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_prometheus_reads_the_rules():
    promtool("check", "rules", "rules.yml")


def test_the_alerts_fire_and_stay_silent_as_their_tests_say():
    promtool("test", "rules", "rules_test.yml")


@pytest.mark.parametrize("fires", [True, False])
def test_every_alert_is_tested(fires):
    groups = yaml.safe_load((DEPLOY / "prometheus/rules_test.yml").read_text())["tests"]
    tested = {
        t["alertname"] for group in groups for t in group["alert_rule_test"] if bool(t.get("exp_alerts")) is fires
    }
    assert {rule["alert"] for rule in rules() if "alert" in rule} <= tested


def test_the_rules_use_metrics_that_exist():
    from app.core.metrics import NAMES

    assert metric_names(" ".join(rule["expr"] for rule in rules())) <= NAMES


def test_the_dashboards_show_all_metrics_and_none_that_does_not_exist():
    from app.core.metrics import NAMES

    assert metric_names(" ".join(e for dashboard in DASHBOARDS for e in expressions(dashboard))) == NAMES


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_what_prometheus_can_read(dashboard, tmp_path):
    filled = [e.replace("$__rate_interval", "5m").replace("$model", ".*") for e in expressions(dashboard)]
    queries = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(filled)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": queries}]}))
    promtool("check", "rules", "queries.yml", cwd=tmp_path)
