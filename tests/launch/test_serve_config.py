"""The configuration file for ``serve run`` and ``serve deploy``; Ray ignores unknown keys, these tests find them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from service.errors import SettingsError
from service.launch.ports import Ports
from service.launch.ray_environment import ray_environment
from service.settings import read_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of Ray's own making, while it is imported
    from ray.serve.schema import ServeDeploySchema

    from service.app import APP_NAME, build_app, deployment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> Any:
    return yaml.safe_load((ROOT / "serve_config.yaml").read_text())


def unknown_keys(tree: Any, model: BaseModel, path: str = "") -> Iterator[str]:
    """Keys of the tree for which the parsed model has no field, in nested models too."""
    for key, value in tree.items():
        if key not in type(model).model_fields:
            yield f"{path}/{key}"
            continue
        parsed = getattr(model, key)
        if isinstance(parsed, BaseModel):
            yield from unknown_keys(value, parsed, f"{path}/{key}")
        elif isinstance(parsed, list):
            for index, (entry, part) in enumerate(zip(value, parsed, strict=True)):
                if isinstance(part, BaseModel):
                    yield from unknown_keys(entry, part, f"{path}/{key}/{index}")


def test_every_key_is_known(config: dict[str, Any]) -> None:
    """The file has no key that Ray would silently ignore."""
    assert list(unknown_keys(config, ServeDeploySchema.model_validate(config))) == []


def test_the_search_for_unknown_keys_finds_one(config: dict[str, Any]) -> None:
    """A misspelt nested key, which Ray's own schema accepts, is found."""
    config["applications"][0]["deployments"][0]["num_replica"] = 3

    assert list(unknown_keys(config, ServeDeploySchema.model_validate(config))) == [
        "/applications/0/deployments/0/num_replica"
    ]


def test_arguments_are_settings(config: dict[str, Any]) -> None:
    """The application's arguments are a valid settings tree."""
    read_settings(config["applications"][0]["args"])


def test_names_agree_with_the_code(config: dict[str, Any]) -> None:
    """The file configures the deployment that the code builds, under the same names."""
    application = config["applications"][0]

    assert application["name"] == APP_NAME
    assert application["deployments"][0]["name"] == deployment.name
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"


def test_shutdown_timeout_exceeds_the_deadline(config: dict[str, Any]) -> None:
    """A replica that shuts down waits longer than any request may take."""
    settings = read_settings(config["applications"][0]["args"])

    assert config["applications"][0]["deployments"][0]["graceful_shutdown_timeout_s"] > settings.limits.deadline_s


def test_http_host_is_loopback_and_written_out(config: dict[str, Any]) -> None:
    """The file as it is serves this machine only."""
    assert config["http_options"]["host"] == "127.0.0.1"


def test_unknown_setting_does_not_deploy() -> None:
    """An argument that is not a setting is refused and named."""
    with pytest.raises(
        SettingsError, match=r"limits\.max_itens: is not a setting \(did you mean limits\.max_item_chars"
    ):
        build_app({"limits": {"max_itens": 3}})


def test_documented_environment_is_the_one_of_the_command(tmp_path: Path) -> None:
    """``reward-serve`` sets every line of docs/serve.env, apart from the drain period."""
    lines = (ROOT / "docs" / "serve.env").read_text().splitlines()
    documented = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    ports = Ports(8000, 21001, 21002, 21003, 21004, 21005, range(21006, 21050))
    ours = ray_environment(tmp_path, ports, tmp_path / "token", cores=2, deadline_s=600.0, drain_s=5)

    assert documented.items() <= ours.items()
