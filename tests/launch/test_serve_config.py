"""The configuration file for ``serve run`` and ``serve deploy``; Ray ignores unknown keys, these tests find them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from service.autoscaling import QueuedTokensPolicy
from service.errors import SettingsError
from service.launch.ports import Ports
from service.launch.ray_environment import ray_environment
from service.launch.serve_config import (
    POLICY,
    Application,
    AutoscalingConfig,
    DeploymentConfig,
    HttpOptions,
    LoggingConfig,
    Policy,
    PolicyArguments,
    RayActorOptions,
    ServeConfig,
    check_serve_config,
    main,
    notes_on,
)
from service.settings import read_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of Ray's own making, while it is imported
    from ray.serve.config import AutoscalingConfig as RayAutoscalingConfig
    from ray.serve.config import AutoscalingPolicy
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        RayActorOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )
    from ray.serve.schema import LoggingConfig as RayLoggingConfig

    from service.app import APP_NAME, build_app, deployment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> Any:
    return yaml.safe_load((ROOT / "serve_config.yaml").read_text())


def deployment_of(config: dict[str, Any]) -> dict[str, Any]:
    deployment: dict[str, Any] = config["applications"][0]["deployments"][0]
    return deployment


def test_the_file_is_valid(config: dict[str, Any]) -> None:
    """The file has no key that Ray would silently ignore, and its parts agree."""
    check_serve_config(config)


AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 8,
    "policy": {"policy_function": POLICY, "policy_kwargs": {"target_queue_s": 1.5}},
}


def with_autoscaling(config: dict[str, Any], **changes: Any) -> None:
    del deployment_of(config)["num_replicas"]
    deployment_of(config)["autoscaling_config"] = AUTOSCALING | changes


def test_the_autoscaling_of_the_file_is_valid() -> None:
    """The commented block in place of num_replicas passes the strict check as it stands."""
    text = (ROOT / "serve_config.yaml").read_text()
    block = re.search(r"        # autoscaling_config:\n(        #   .*\n)+", text)
    assert block is not None
    config = yaml.safe_load(text.replace("        num_replicas: 1\n", block[0].replace("        # ", "        ")))

    assert deployment_of(config)["autoscaling_config"]["policy"]["policy_function"] == POLICY
    check_serve_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(proxy_locations="EveryNode"), "proxy_locations is not a key .did you mean proxy_location"),
        (lambda c: c["http_options"].pop("host"), "http_options/host: Field required"),
        (lambda c: deployment_of(c).update(num_replica=3), "deployments/0/num_replica is not a key .*num_replicas"),
        (lambda c: deployment_of(c)["ray_actor_options"].update(num_gpu=1), "num_gpu is not a key .*num_gpus"),
        (lambda c: deployment_of(c)["ray_actor_options"].update(num_gpus=1.5), "num_gpus must be a whole number"),
        (lambda c: deployment_of(c).update(max_ongoing_requests=5), "max_ongoing_requests: .*32"),
        (lambda c: deployment_of(c).update(graceful_shutdown_timeout_s=60), "must be above limits.deadline_s"),
        (lambda c: deployment_of(c).update(autoscaling_config=AUTOSCALING), "num_replicas or autoscaling_config"),
        (lambda c: with_autoscaling(c, max_replica=3), "max_replica is not a key"),
        (lambda c: with_autoscaling(c, look_back_period_s=10), "look_back_period_s: .*greater than 10"),
        (lambda c: with_autoscaling(c, min_replicas=9), "needs min_replicas <= initial_replicas <= max_replicas"),
        (lambda c: with_autoscaling(c, policy={"policy_function": "mine:policy"}), "policy_function"),
        (lambda c: c["applications"][0]["args"].update(limit={}), "limit: is not a setting .did you mean limits"),
        (lambda c: c["applications"][0]["args"].update(model={"device": "cuda"}), "num_gpus is 0"),
        (lambda c: c["applications"].append(c["applications"][0]), "Several applications have the name reward"),
        (lambda c: c["applications"][0].update(import_path="service.app:deployment"), "import_path must be"),
    ],
)
def test_mistakes_are_named(config: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Each mistake, most of which Ray accepts silently, is refused by a sentence that names it."""
    change(config)

    with pytest.raises(SettingsError, match=message):
        check_serve_config(config)


def test_an_update_that_interrupts_the_service_is_told(config: dict[str, Any]) -> None:
    """The shipped file keeps its only replica until the successor answers; a file that does not gets a note."""
    assert notes_on(check_serve_config(config)[0]) == []
    deployment_of(config)["max_surge_percent"] = 0
    (note,) = notes_on(check_serve_config(config)[0])
    assert note.startswith("Note: application reward has one replica and max_surge_percent 0")
    deployment_of(config)["num_replicas"] = 2
    assert notes_on(check_serve_config(config)[0]) == []


@pytest.mark.parametrize("num_gpus", [0, 0.25, 0.5, 1, 2])
def test_gpus_of_a_replica(config: dict[str, Any], num_gpus: float) -> None:
    """A replica may take a fraction of a GPU, one, or several."""
    deployment_of(config)["ray_actor_options"]["num_gpus"] = num_gpus

    check_serve_config(config)


def test_several_applications(config: dict[str, Any]) -> None:
    """Several models, each under a route prefix of its own, with autoscaling, are one valid file."""
    with_autoscaling(config)
    config["applications"].append(config["applications"][0] | {"name": "other", "route_prefix": "/other"})

    checked, settings = check_serve_config(config)

    assert [application.route_prefix for application in checked.applications] == ["/", "/other"]
    assert len(settings) == 2


RAY_MODELS = {
    ServeConfig: ServeDeploySchema,
    HttpOptions: HTTPOptionsSchema,
    Application: ServeApplicationSchema,
    DeploymentConfig: DeploymentSchema,
    RayActorOptions: RayActorOptionsSchema,
    AutoscalingConfig: RayAutoscalingConfig,
    Policy: AutoscalingPolicy,
    LoggingConfig: RayLoggingConfig,
}


@pytest.mark.parametrize("model", RAY_MODELS)
def test_every_key_is_rays(model: type[BaseModel]) -> None:
    """The strict schema allows no key that Ray does not know."""
    assert model.model_fields.keys() <= RAY_MODELS[model].model_fields.keys()


def test_the_policy_takes_its_arguments() -> None:
    """Names and defaults in the schema are those of the policy."""
    parameters = inspect.signature(QueuedTokensPolicy).parameters

    assert {name: parameter.default for name, parameter in parameters.items()} == PolicyArguments().model_dump()
    assert f"{QueuedTokensPolicy.__module__}:{QueuedTokensPolicy.__name__}" == POLICY


def test_the_command_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the applications of a valid file, and what is wrong with another one."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("applications: []")

    assert main([str(ROOT / "serve_config.yaml")]) == 0
    assert main([str(bad)]) == 1
    assert main([str(tmp_path / "none.yaml")]) == 1
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().out == "reward at /\n"


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
    with pytest.raises(SettingsError, match=r"limits\.max_itens: is not a setting \(did you mean limits\.max_item_"):
        build_app({"limits": {"max_itens": 3}})


def test_documented_environment_is_the_one_of_the_command(tmp_path: Path) -> None:
    """``reward-serve`` sets every line of docs/serve.env, apart from the drain period."""
    lines = (ROOT / "docs" / "serve.env").read_text().splitlines()
    documented = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    ports = Ports(8000, 21001, 21002, 21003, 21004, 21005, range(21006, 21050))
    ours = ray_environment(
        tmp_path, ports, tmp_path / "token", cores=2, deadline_s=600.0, drain_s=5, max_connections=8192
    )

    assert documented.items() <= ours.items()
