"""Read the settings of a start from its sources: command line, environment, configuration file.

Precedence, highest first: command line, ``REWARD_*`` variables, the file of ``--config``, defaults. Every source has
every setting: ``--model.dtype``, ``REWARD_MODEL__DTYPE``, and ``model: {dtype: ...}`` in the file. pydantic-settings
reads and merges the sources; this module adds error messages, which name the source of a value and never the value.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, InitSettingsSource, PydanticBaseSettingsSource

from service.errors import SettingsError
from service.launch.options import Options, parse_options
from service.launch.start_settings import ENV_PREFIX, SETTING_NAMES, SHORT_OPTIONS, StartSettings, env_variable
from service.setting_fields import describe_invalid, did_you_mean

CONFIG_VARIABLE = "REWARD_CONFIG"
"""Names the configuration file if ``--config`` does not."""

CLIENT_VARIABLE = "REWARD_API_KEY"
"""The client's API key, which may stand in the same environment."""

_KUBERNETES = re.compile(r"(?!.*__)REWARD_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
"""Variables that Kubernetes sets in every pod for a Service named ``reward`` or ``reward-…``."""


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
    config = options.config or _config_of(os.environ)
    sources: tuple[PydanticBaseSettingsSource, ...] = (options.settings, EnvSettingsSource(StartSettings))
    if config is not None:
        sources = (*sources, _read_file(config))

    def source_of(name: str) -> str | None:
        return _source_of(name, [source() for source in sources], config)

    try:
        settings = StartSettings(_build_sources=(sources, {}))
    except ValidationError as error:
        raise SettingsError(describe_invalid(error, SETTING_NAMES, StartSettings, source_of)) from None
    _refuse_other_encodings(settings, source_of)
    if options.opens_page and not settings.page.enabled:
        raise SettingsError("page.enabled is false, so there is no page: leave --open out.")
    return settings, options


def _refuse_other_encodings(settings: StartSettings, source_of: Callable[[str], str | None]) -> None:
    """Refuse texts that are not UTF-8: Python has them with surrogates, which JSON and other processes cannot take."""
    for name in SETTING_NAMES:
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            hint = "" if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" else _UTF8_HINT
            raise SettingsError(f"{name} ({source_of(name) or 'default'}) is not valid UTF-8{hint}.")


_UTF8_HINT = f" in this environment, whose encoding is {sys.getfilesystemencoding()}: set PYTHONUTF8=1"


def refuse_unknown_variables(environment: Iterable[str]) -> None:
    """Check that every ``REWARD_*`` variable is the variable of a setting, or one of Kubernetes' Service variables.

    Args:
        environment: names of variables.

    Raises:
        SettingsError: some are not; the message names each of them and the nearest variable that exists.
    """
    known = [CONFIG_VARIABLE, CLIENT_VARIABLE, *map(env_variable, SETTING_NAMES)]
    unknown = [
        name
        for name in environment
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and not _KUBERNETES.fullmatch(name)
    ]
    if unknown:
        reasons = "; ".join(
            f"{name} is not a variable of this service{did_you_mean(name.upper(), known)}" for name in sorted(unknown)
        )
        raise SettingsError(f"The environment is not valid: {reasons}.")


def _config_of(environment: Mapping[str, str]) -> str | None:
    """The configuration file that the environment names, in any case as all variables; None also where it is empty."""
    return next((value for name, value in environment.items() if name.upper() == CONFIG_VARIABLE and value), None)


class _UniqueKeysLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error, because one of its values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(None, None, f"the key {key} stands twice", node.value[number][0].start_mark)
        return super().construct_mapping(node, deep)


def _read_file(path: str) -> InitSettingsSource:
    tree = _parse_file(path)
    if not isinstance(tree, dict):
        raise SettingsError(f"The configuration file {path} is not a mapping of settings.")
    # Before the sources are merged: a section that is not a mapping would be replaced by another source's.
    for name, value in tree.items():
        if name not in StartSettings.model_fields:
            names = list(StartSettings.model_fields)
            raise SettingsError(f"{name} (file {path}) is not a setting{did_you_mean(str(name), names)}.")
        if f"{name}." in _SECTIONS and not isinstance(value, dict):
            raise SettingsError(f"{name} (file {path}) is a section: it must be a mapping of settings.")
    return InitSettingsSource(StartSettings, tree)


_SECTIONS = {f"{name.partition('.')[0]}." for name in SETTING_NAMES if "." in name}


def _parse_file(path: str) -> object:
    """Return the content of a YAML file; an empty file is an empty mapping."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        tree = yaml.load(text, _UniqueKeysLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise SettingsError(f"The configuration file {path} cannot be read: {reason}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" (line {mark.line + 1})" if mark else ""
        twice = str(error.problem).endswith("stands twice")
        raise SettingsError(
            f"The configuration file {path} {f'is not valid: {error.problem}' if twice else 'is not YAML'}{line}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise SettingsError(f"The configuration file {path} is not YAML.") from None
    return {} if tree is None else tree


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
