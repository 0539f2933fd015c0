"""The config file for ``serve run`` and ``serve deploy``: Ray takes keys that it does not know, these tests do not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from service.errors import SettingsError
from service.launch.ray_environment import Ports, ray_environment
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
    """Keys of the tree that the parsed model has no field for, wherever its fields are models themselves."""
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
    """The file holds no key that Ray would silently ignore."""
    assert list(unknown_keys(config, ServeDeploySchema.model_validate(config))) == []


def test_the_search_for_unknown_keys_finds_one(config: dict[str, Any]) -> None:
    """A misspelt key deep inside, which Ray's own schema takes, does not pass here."""
    config["applications"][0]["deployments"][0]["num_replica"] = 3

    assert list(unknown_keys(config, ServeDeploySchema.model_validate(config))) == [
        "/applications/0/deployments/0/num_replica"
    ]


def test_arguments_are_settings(config: dict[str, Any]) -> None:
    """The application's arguments are a settings tree as it stands."""
    read_settings(config["applications"][0]["args"])


def test_names_agree_with_the_code(config: dict[str, Any]) -> None:
    """The file configures the deployment that the code builds, under the name by which it is found."""
    application = config["applications"][0]

    assert application["name"] == APP_NAME
    assert application["deployments"][0]["name"] == deployment.name
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"


def test_the_longest_request_outlives_no_replica(config: dict[str, Any]) -> None:
    """A replica that leaves waits longer than any request may take."""
    settings = read_settings(config["applications"][0]["args"])

    assert config["applications"][0]["deployments"][0]["graceful_shutdown_timeout_s"] > settings.limits.deadline_s


def test_http_host_is_loopback_and_written_out(config: dict[str, Any]) -> None:
    """Nobody is reachable from outside by leaving the file as it is."""
    assert config["http_options"]["host"] == "127.0.0.1"


def test_unknown_setting_does_not_deploy() -> None:
    """An argument that no setting has refuses to build, and is named."""
    with pytest.raises(SettingsError, match=r"limits\.max_itens"):
        build_app({"limits": {"max_itens": 3}})


def test_documented_environment_is_the_commands(tmp_path: Path) -> None:
    """Every line of docs/serve.env is what ``reward-serve`` sets, but for the production drain."""
    lines = (ROOT / "docs" / "serve.env").read_text().splitlines()
    documented = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    ours = ray_environment(tmp_path, Ports(8000), deadline_s=600.0, drain_s=5)

    assert documented.items() <= ours.items()
