"""Read the settings of a start from its sources: command line, environment, configuration file.

Precedence, highest first: command line, ``REWARD_*`` variables, the file of ``--config``, defaults. Every source has
every setting: ``--model.dtype``, ``REWARD_MODEL__DTYPE``, and ``model: {dtype: ...}`` in the file. pydantic-settings
reads and merges the sources; this module adds error messages, which name the source of a value and never the value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, PydanticBaseSettingsSource, YamlConfigSettingsSource

from service.errors import SettingsError
from service.launch.options import Options, parse_options
from service.launch.start_settings import ENV_PREFIX, SETTING_NAMES, SHORT_OPTIONS, StartSettings, env_variable
from service.settings import describe_invalid, did_you_mean

CONFIG_VARIABLE = "REWARD_CONFIG"
"""Names the configuration file if ``--config`` does not."""


def read_sources(arguments: Sequence[str] | None = None) -> tuple[StartSettings, Options]:
    """Return the settings that the sources give together, and the command line.

    Args:
        arguments: of the command; None: those of this process.

    Raises:
        SystemExit: as ``parse_options``.
        SettingsError: a setting, a variable or a key is unknown, a value is malformed, or the file cannot be read.
    """
    options = parse_options(arguments)
    refuse_unknown_variables(os.environ)
    config = options.config or os.environ.get(CONFIG_VARIABLE)
    sources: tuple[PydanticBaseSettingsSource, ...] = (options.settings, EnvSettingsSource(StartSettings))
    if config is not None:
        sources = (*sources, _read_file(config))
    try:
        return StartSettings(_build_sources=(sources, {})), options
    except ValidationError as error:
        trees = [source() for source in sources]
        raise SettingsError(
            describe_invalid(error, SETTING_NAMES, lambda name: _source_of(name, trees, config))
        ) from None


def refuse_unknown_variables(environment: Iterable[str]) -> None:
    """Check that every ``REWARD_*`` variable is the variable of a setting.

    Args:
        environment: names of variables.

    Raises:
        SettingsError: some are not; the message names each of them and the nearest variable that exists.
    """
    known = [CONFIG_VARIABLE, *map(env_variable, SETTING_NAMES)]
    unknown = [name for name in environment if name.upper().startswith(ENV_PREFIX) and name.upper() not in known]
    if unknown:
        reasons = "; ".join(
            f"{name} is not a variable of this service{did_you_mean(name.upper(), known)}" for name in sorted(unknown)
        )
        raise SettingsError(f"The environment is not valid: {reasons}.")


def _read_file(path: str) -> YamlConfigSettingsSource:
    file = Path(path).expanduser()
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        if tree is not None and not isinstance(tree, dict):
            raise SettingsError(f"The configuration file {path} is not a mapping of settings.")
        return YamlConfigSettingsSource(StartSettings, file)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise SettingsError(f"The configuration file {path} cannot be read: {reason}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise SettingsError(f"The configuration file {path} is not YAML{line}.") from None


def _source_of(name: str, trees: Sequence[Mapping[str, Any]], config: str | None) -> str | None:
    """Where the value of a setting comes from, as the user wrote it; None for a default."""
    labels = (SHORT_OPTIONS.get(name, f"--{name}"), env_variable(name), f"file {config}")
    return next((label for label, tree in zip(labels, trees, strict=False) if _has(tree, name)), None)


def _has(tree: object, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True
