"""The settings of ``reward-serve``: the tree of the served model, and the server around it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.setting_fields import setting_names
from service.settings import Section, Settings

ENV_PREFIX = "REWARD_"
ENV_DELIMITER = "__"
NULL = "null"
"""What stands for null on the command line and in the environment, as in YAML."""

SHORT_OPTIONS = {
    "model.path": "--model",
    **{
        f"model.{name}": f"--{name.replace('_', '-')}"
        for name in (
            "revision",
            "name",
            "engine",
            "forward",
            "device",
            "dtype",
            "pooling",
            "max_input_tokens",
            "num_threads",
            "kernels",
            "compile",
            "quantization",
        )
    },
    "batching.max_batch_tokens": "--max-batch-tokens",
    "batching.prefix_cache_mib": "--prefix-cache-mib",
    "batching.deterministic": "--deterministic",
    "batching.batch_invariant": "--batch-invariant",
    "protocols.enabled": "--protocols",
    "security.api_keys": "--api-keys",
    "security.authentication": "--authentication",
    "server.host": "--host",
    "server.port": "--port",
    "server.replicas": "--replicas",
    "code_revision": "--code-revision",
}
"""Short options of frequent settings, by dotted name; each setting also has its dotted name as an option."""


class ServerSettings(Section):
    """The HTTP server that ``reward-serve`` starts. Ray's own commands take these from ``http_options`` instead."""

    host: str = Field("127.0.0.1", description="Address on which HTTP listens; the default is this machine only.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of HTTP.")
    tls_certificate: str | None = Field(
        None,
        description="PEM file with the certificate of the server and its chain: HTTP is then HTTPS. For runtime local; "
        "with Ray TLS ends in front of the service. null: plain HTTP.",
    )
    tls_key: str | None = Field(None, description="PEM file with the private key of the certificate, not encrypted.")
    replicas: int = Field(
        1, ge=1, description="Copies of the model; each takes a GPU if the machine has any, else a share of the cores."
    )


class StartSettings(Settings, BaseSettings):
    """All settings of ``reward-serve``; built by ``service.launch.sources`` from its sources."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_parse_none_str=NULL,
        env_ignore_empty=True,
        cli_parse_none_str=NULL,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_show_env_vars=True,
        cli_use_class_docs_for_groups=True,
    )

    runtime: Literal["ray", "local"] = Field(
        "ray",
        description="What runs the service. ray: Ray Serve, any number of replicas, each replaced when it fails; "
        "local: one replica and its HTTP server in one process without Ray, which starts in seconds.",
    )
    server: ServerSettings = ServerSettings()

    def served_model(self) -> Settings:
        """The part that each replica gets."""
        return Settings.model_validate(self.model_dump(exclude={"runtime", "server"}))


SETTING_NAMES = tuple(setting_names(StartSettings))
"""Dotted names of all settings of ``reward-serve``."""


def env_variable(name: str) -> str:
    """The environment variable of a setting, given its dotted name."""
    return ENV_PREFIX + name.replace(".", ENV_DELIMITER).upper()
