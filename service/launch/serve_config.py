"""Check a configuration for ``serve deploy`` strictly: Ray accepts unknown keys and silently ignores them.

``python -m service.launch.serve_config serve_config.yaml`` prints what is wrong and ends with status 1, or prints the
applications. The schema has the keys of Ray Serve 2.60 that make sense for this service; Ray is not imported.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from service.arguments import CommandParser
from service.errors import SettingsError
from service.setting_fields import did_you_mean
from service.settings import Section, Settings, read_settings

IMPORT_PATH = "service.app:build_app"
POLICY = "service.autoscaling:QueuedTokensPolicy"
REPORT_INTERVAL_S = 10.0
"""Ray's ``metrics_interval_s``: seconds between two reports of a replica to the autoscaler."""

_Fraction = Annotated[float, Field(ge=0)]
_Seconds = Annotated[float, Field(gt=0)]


class HttpOptions(Section):
    """Where the proxies listen; fixed once Serve runs."""

    host: str = Field(description="Written out, because Ray's own default is all interfaces.")
    port: int = Field(8000, ge=1, le=65_535)
    keep_alive_timeout_s: int | None = Field(None, ge=1)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class LoggingConfig(Section):
    """Ray's own logs."""

    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: int | Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = True


class PolicyArguments(Section):
    """Arguments of `service.autoscaling.QueuedTokensPolicy`."""

    target_queue_s: float = Field(2.0, gt=0)
    target_busy: float = Field(0.8, gt=0, le=1)


class Policy(Section):
    """The autoscaling policy; Ray's own counts requests, and a request may have one item or two thousand."""

    policy_function: Literal["service.autoscaling:QueuedTokensPolicy"]
    policy_kwargs: PolicyArguments = PolicyArguments()


class AutoscalingConfig(Section):
    """Bounds and delays of the number of replicas."""

    min_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=1)
    max_replicas: int = Field(ge=1)
    # Ray warns of a period within its interval of reports, and will refuse it.
    look_back_period_s: float = Field(30.0, gt=REPORT_INTERVAL_S)
    upscale_delay_s: float = Field(30.0, ge=0)
    downscale_delay_s: float = Field(600.0, ge=0)
    upscaling_factor: _Seconds | None = None
    downscaling_factor: _Seconds | None = None
    aggregation_function: Literal["mean", "max", "min"] = "mean"
    policy: Policy

    @model_validator(mode="after")
    def _check_order(self) -> AutoscalingConfig:
        if not self.min_replicas <= (self.initial_replicas or self.min_replicas) <= self.max_replicas:
            raise ValueError("needs min_replicas <= initial_replicas <= max_replicas")
        return self


class RayActorOptions(Section):
    """What one replica takes of its node. Ray counts with it and isolates nothing but whole GPUs."""

    num_cpus: _Fraction = 1
    num_gpus: _Fraction = 0
    memory: int | None = Field(None, ge=1)
    accelerator_type: str | None = None
    resources: dict[str, float] | None = None
    label_selector: dict[str, str] | None = None
    runtime_env: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_gpus(self) -> RayActorOptions:
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError("num_gpus must be a whole number above 1, or at most 1")
        return self


class DeploymentConfig(Section):
    """The one deployment of an application."""

    name: Literal["reward"]
    num_replicas: int | None = Field(None, ge=1)
    autoscaling_config: AutoscalingConfig | None = None
    max_ongoing_requests: int = Field(100_000, ge=32)
    max_queued_requests: int = Field(-1, ge=-1)
    max_replicas_per_node: int | None = Field(None, ge=1)
    health_check_period_s: _Seconds = 5
    health_check_timeout_s: _Seconds = 10
    graceful_shutdown_timeout_s: _Seconds = 30
    graceful_shutdown_wait_loop_s: _Seconds = 0.2
    max_surge_percent: int = Field(0, ge=0)
    rolling_update_percentage: float | None = Field(None, gt=0, le=1)
    logging_config: LoggingConfig | None = None
    ray_actor_options: RayActorOptions = RayActorOptions()

    @model_validator(mode="after")
    def _check_replicas(self) -> DeploymentConfig:
        if self.num_replicas is not None and self.autoscaling_config is not None:
            raise ValueError("takes num_replicas or autoscaling_config, not both")
        return self


class Application(Section):
    """One served model."""

    name: str = Field(min_length=1)
    route_prefix: str = Field("/", pattern=r"^/([A-Za-z0-9._~/-]*[A-Za-z0-9._~-])?$")
    import_path: str
    runtime_env: dict[str, Any] | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: tuple[DeploymentConfig, ...] = Field((), max_length=1)


class ServeConfig(Section):
    """The whole file."""

    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    http_options: HttpOptions
    logging_config: LoggingConfig | None = None
    applications: tuple[Application, ...] = Field(min_length=1)


def check_serve_config(tree: Mapping[str, Any]) -> tuple[ServeConfig, tuple[Settings, ...]]:
    """Return a configuration and the settings of each application.

    Args:
        tree: the file as plain data.

    Raises:
        SettingsError: a key is unknown, a value malformed, or two parts contradict each other; names each by its path.
    """
    try:
        config = ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(f"The Serve configuration is not valid: {'; '.join(_problems(error))}.") from None
    for kind in ("name", "route_prefix"):
        repeated = [
            value for value, count in Counter(getattr(app, kind) for app in config.applications).items() if count > 1
        ]
        if repeated:
            raise SettingsError(f"Several applications have the {kind} {repeated[0]}: each needs its own.")
    return config, tuple(_check_application(application) for application in config.applications)


def _check_application(application: Application) -> Settings:
    if application.import_path != IMPORT_PATH:
        raise SettingsError(f"Application {application.name}: import_path must be {IMPORT_PATH}.")
    try:
        settings = read_settings(dict(application.args))
    except SettingsError as error:
        raise SettingsError(f"Application {application.name}: {error}") from None
    for deployment in application.deployments:
        if deployment.graceful_shutdown_timeout_s <= settings.limits.deadline_s:
            raise SettingsError(
                f"Application {application.name}: graceful_shutdown_timeout_s "
                f"({deployment.graceful_shutdown_timeout_s:g}) must be above limits.deadline_s "
                f"({settings.limits.deadline_s:g}), or a stopping replica ends accepted requests."
            )
        if settings.model.device.startswith("cuda") and not deployment.ray_actor_options.num_gpus:
            raise SettingsError(
                f"Application {application.name}: model.device is {settings.model.device}, but num_gpus is 0, so Ray "
                "hides all GPUs from the replica."
            )
    return settings


def notes_on(config: ServeConfig) -> list[str]:
    """Return a sentence for each part that is valid and may surprise."""
    return [
        f"Note: application {application.name} has one replica and max_surge_percent 0: serve deploy stops it before "
        "its successor starts, and callers get 503 until that answers."
        for application in config.applications
        for deployment in application.deployments
        if (deployment.num_replicas or 1) == 1
        and deployment.autoscaling_config is None
        and not deployment.max_surge_percent
    ]


def _problems(error: ValidationError) -> list[str]:
    """One clause for each error, without the values."""
    known = [name for model in _MODELS for name in model.model_fields]
    clauses = []
    for problem in error.errors(include_input=False, include_url=False):
        path = "/".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            clauses.append(f"{path} is not a key{did_you_mean(str(problem['loc'][-1]), known)}")
        else:
            clauses.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
    return clauses


_MODELS: tuple[type[Section], ...] = (
    ServeConfig, HttpOptions, LoggingConfig, Application, DeploymentConfig, AutoscalingConfig, Policy, PolicyArguments,
    RayActorOptions,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the file that the only argument names; returns the exit status."""
    parser = CommandParser(
        prog="python -m service.launch.serve_config", description="Check a configuration of Ray Serve for this service."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="serve_config.yaml")
    file = parser.parse(arguments).file
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        config, _ = check_serve_config(tree if isinstance(tree, dict) else {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"{file} cannot be read: {error}", file=sys.stderr)
        return 1
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for application in config.applications:
        print(f"{application.name} at {application.route_prefix}")
    for note in notes_on(config):
        print(note, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
