"""The compose files: valid, everything that they mount exists, and Prometheus and Grafana find what they are given."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_tools import run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "compose"
FILES = (FOLDER / "compose.yaml", FOLDER / "compose.gpu.yaml")
SCHEMA = "vendor.compose-spec"


def services(path: Path = FILES[0]) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text())["services"])


def mounted_files(service: str) -> dict[Path, Path]:
    """The files of the repository that a service gets: path in the container to path here."""
    volumes = [volume.split(":") for volume in services()[service]["volumes"]]
    return {Path(target): FOLDER / source for source, target, *_ in volumes if source.startswith(".")}


def container_tree(service: str, folder: Path) -> Path:
    """Copy the mounted files to their places in the container, below a folder; returns the folder."""
    for target, source in mounted_files(service).items():
        copy = folder / target.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    return folder


def schema_errors(path: Path) -> str:
    """What the schema of the compose specification has against a file; empty where it is valid."""
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed; it has the schema of the compose specification")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMA, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_is_valid(path: Path) -> None:
    """The compose specification's own schema accepts the file."""
    assert schema_errors(path) == ""


def test_misspelt_key_is_found(tmp_path: Path) -> None:
    """The schema refuses a service with a key that does not exist, so the test above can fail."""
    tree = yaml.safe_load(FILES[0].read_text())
    tree["services"]["reward"]["helthcheck"] = {}
    path = tmp_path / "compose.yaml"
    path.write_text(yaml.safe_dump(tree))

    assert "helthcheck" in schema_errors(path)


def test_mounted_files_exist() -> None:
    """Every file that is mounted for Prometheus and Grafana is in the repository; otherwise a folder would be made."""
    sources = [source for service in ("prometheus", "grafana") for source in mounted_files(service).values()]

    assert len(sources) == 6
    assert [source for source in sources if not source.is_file()] == []


def test_ports_are_on_loopback() -> None:
    """No port of any service can be reached from another machine, since neither encryption nor a proxy is set up."""
    ports = [port for service in services().values() for port in service["ports"]]

    assert ports == ["127.0.0.1:8000:8000", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"]


def test_gpu_file_changes_the_service_only() -> None:
    """The file for GPUs names services and keys of the main file, and asks for NVIDIA devices."""
    override = services(FILES[1])

    assert set(override) == {"reward"}
    assert override["reward"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"


def test_prometheus_configuration_is_valid(tmp_path: Path) -> None:
    """Promtool accepts the configuration with its rules at the places where the container has them."""
    tree = container_tree("prometheus", tmp_path)

    output = run("promtool", "check", "config", tree / "etc" / "prometheus" / "prometheus.yml")

    assert "SUCCESS: 2 rule files found" in output


def test_prometheus_scrapes_as_the_alerts_expect() -> None:
    """The job has the name and the timing of monitoring/prometheus.yml, and its target is the service's container."""
    ours = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    original = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())
    [job], [expected] = ours["scrape_configs"], original["scrape_configs"]

    assert job == expected | {"static_configs": [{"targets": ["reward:8000"]}]}
    assert ours["global"] == original["global"]
    assert ours["rule_files"] == original["rule_files"]


def test_grafana_finds_the_dashboard(tmp_path: Path) -> None:
    """The provider's folder holds the dashboard, whose data source variable finds the compose file's Prometheus."""
    etc = container_tree("grafana", tmp_path) / "etc" / "grafana"
    provider = yaml.safe_load((etc / "provisioning/dashboards/reward-service.yml").read_text())["providers"][0]
    source = yaml.safe_load((etc / "provisioning/datasources/reward-service.yml").read_text())["datasources"][0]
    dashboards = list((tmp_path / Path(provider["options"]["path"]).relative_to("/")).glob("*.json"))
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    dashboard = json.loads(dashboards[0].read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}

    assert dashboards == [tmp_path / Path(home).relative_to("/")]
    assert variables["datasource"]["query"] == source["type"] == "prometheus"
    assert source["isDefault"]
    assert source["url"] == "http://prometheus:9090"


def test_service_has_what_the_image_needs() -> None:
    """The service has a writable cache and temporary folder beside its read-only root, and time for its drain."""
    from service.launch.supervisor import STOP_AFTER_S

    service = services()["reward"]

    assert service["read_only"]
    assert "cache:/home/reward/.cache" in service["volumes"]
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])  # noqa: S108 - a path in the container
    assert int(service["stop_grace_period"].removesuffix("s")) > STOP_AFTER_S
