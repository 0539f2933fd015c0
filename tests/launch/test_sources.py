"""Settings from command line, environment and configuration file: precedence, coverage, and error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from service.errors import SettingsError
from service.launch.sources import read_sources
from service.launch.start_settings import SETTING_NAMES, SHORT_OPTIONS, StartSettings, env_variable

SECRET = "value-of-a-secret"  # noqa: S105 - a marker, no password
DEFAULTS = StartSettings.model_construct()
DTYPES = {"--dtype": "float16", "REWARD_MODEL__DTYPE": "bfloat16", "file": "float32"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not depend on the environment of the test run."""
    for name in [name for name in os.environ if name.startswith("REWARD_")]:
        monkeypatch.delenv(name)


def value_in(settings: BaseModel, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def default_of(name: str) -> Any:
    return value_in(DEFAULTS, name)


def other_value(name: str) -> str:
    """A valid value of a setting, as text, that differs from its default."""
    special = {"model.cuda_graphs": "false", "tokenization.template": "concat", "server.port": "9000"}
    special |= {"tokenization.special_tokens": "leading", "tokenization.unrendered": "accept"}
    special |= {"tokenization.completion_special_tokens": "escape"}
    special |= {"tokenization.chat_template_kwargs": '["mode"]'}
    special |= {"model.reward_weights": '{"help": 0.5}', "model.outputs": '["a", "b"]'}
    literals = {
        "model.engine": "onnx", "model.forward": "padded", "model.dtype": "float32", "model.pooling": "last",
        "model.device": "cpu", "model.step_aggregate": "min", "model.kernels": "off", "model.quantization": "int8",
        "tokenization.truncation": "prompt_left",
        "diagnostics.level": "full", "runtime": "local", "protocols.enabled": "slime,kserve",
        "protocols.truncation": "prompt_left", "protocols.activation": "sigmoid",
        "protocols.openrlhf_scores": "sigmoid", "protocols.slime_template": "chat",
        "security.authentication": "required", "page.audit_url": "https://audits.example/report",
        "tracing.endpoint": "https://traces.example/v1/traces",
    }  # fmt: skip
    if name in special | literals:
        return (special | literals)[name]
    default = default_of(name)
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, int):
        return str(default + 1)
    return "0.25" if isinstance(default, float) else "7"


def read(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, environment: Mapping[str, str] | None = None
) -> StartSettings:
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value)
    return read_sources(arguments)[0]


def write_config(folder: Path, tree: Any) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


@pytest.mark.parametrize("name", SETTING_NAMES)
def test_every_setting_has_every_source(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each setting can be given by its dotted option, by its variable and in the file, with the same result."""
    text = other_value(name)
    *sections, last = name.split(".")
    tree: dict[str, Any] = {last: yaml.safe_load(text)} if not text.startswith("7") else {last: text}
    for section in sections:
        tree = {section: tree}
    is_flag = isinstance(default_of(name), bool)
    flag = f"--no-{name}" if text == "false" else f"--{name}"

    by_option = read(monkeypatch, flag) if is_flag else read(monkeypatch, f"--{name}", text)
    by_file = read(monkeypatch, "--config", write_config(tmp_path, tree))
    by_variable = read(monkeypatch, environment={env_variable(name): text})

    assert value_in(by_option, name) == value_in(by_file, name) == value_in(by_variable, name)
    assert value_in(by_option, name) != default_of(name)


@pytest.mark.parametrize(
    "given", [("--dtype", "REWARD_MODEL__DTYPE", "file"), ("REWARD_MODEL__DTYPE", "file"), ("file",)]
)
def test_precedence(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line comes before the environment, the environment before the file, the file before the default."""
    options = ["--dtype", DTYPES["--dtype"]] if "--dtype" in given else []
    environment = {name: DTYPES[name] for name in given if name.startswith("REWARD_")}
    config = write_config(tmp_path, {"model": {"dtype": DTYPES["file"], "pooling": "last"}})

    settings = read(monkeypatch, *options, "--config", config, environment=environment)

    assert settings.model.dtype == DTYPES[given[0]]
    assert settings.model.pooling == "last"


@pytest.mark.parametrize(("name", "short"), SHORT_OPTIONS.items())
def test_short_option_is_its_setting(name: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short option sets the same as the dotted one."""
    text = () if isinstance(default_of(name), bool) else (other_value(name),)

    assert read(monkeypatch, short, *text) == read(monkeypatch, f"--{name}", *text)


def test_null_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``null`` overrides a value of the file with no value."""
    config = write_config(tmp_path, {"model": {"path": "somewhere"}})

    assert read(monkeypatch, "--config", config, "--model", "null").model.path is None


def test_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable leaves the default, as containers pass variables that their user did not set."""
    assert read(monkeypatch, environment={"REWARD_LOG": "", "REWARD_SERVER__PORT": ""}).server.port == 8000


def test_config_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``REWARD_CONFIG`` names the file where ``--config`` does not."""
    config = write_config(tmp_path, {"server": {"port": 1}})

    assert read(monkeypatch, environment={"REWARD_CONFIG": config}).server.port == 1


def test_check_names_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--check DIR`` is the model of the check."""
    settings, options = read_sources(["--check", "DIR"])

    assert options.check
    assert settings.model.path == "DIR"


def test_a_replica_gets_no_server_settings() -> None:
    """The tree of a replica has no section for the server, which is not its part."""
    settings, _ = read_sources(["--port", "1", "--dtype", "float32"])

    assert "server" not in settings.served_model().model_dump()
    assert settings.served_model().model.dtype == "float32"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [("REWARD_MODLE__PATH", "REWARD_MODEL__PATH"), ("REWARD_MODEL", "REWARD_MODEL__"), ("REWARD_LOGS", "REWARD_LOG")],
)
def test_unknown_variable(variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown ``REWARD_*`` variable is refused with the nearest one that exists, and without its value."""
    with pytest.raises(
        SettingsError, match=rf"^The environment is not valid: {variable} .*did you mean {nearest}"
    ) as caught:
        read(monkeypatch, environment={variable: SECRET, "HOME": "/root"})

    assert SECRET not in str(caught.value)


def test_unknown_key_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unknown key is refused with the file and the nearest setting, and without its value."""
    config = write_config(tmp_path, {"batching": {"max_batch_token": SECRET}})

    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, "--config", config)

    assert str(caught.value) == (
        f"The settings are not valid: batching.max_batch_token (file {config}): is not a setting "
        "(did you mean batching.max_batch_tokens?)."
    )


@pytest.mark.parametrize("source", ["--port", "REWARD_SERVER__PORT", "file"])
def test_malformed_value(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A malformed value is refused with its setting and its source, and is not repeated."""
    config = write_config(tmp_path, {"server": {"port": SECRET if source == "file" else 1}})
    options = ["--port", SECRET] if source == "--port" else []
    environment = {source: SECRET} if source.startswith("REWARD_") else {}

    with pytest.raises(SettingsError, match=r"server\.port \(") as caught:
        read(monkeypatch, *options, "--config", config, environment=environment)

    assert (f"file {config}" if source == "file" else source) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_each_alternative_of_a_setting_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting with two types is one entry of the message, under its own name."""
    with pytest.raises(
        SettingsError, match=r"^The settings are not valid: model\.cuda_graphs \(--model\.cuda_graphs\): "
    ) as caught:
        read(monkeypatch, "--model.cuda_graphs", SECRET)

    assert str(caught.value).count("model.cuda_graphs (") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "cannot be read"), ("a: [", "is not YAML"), ("[1]", "is not a mapping"), ("\xff", "is not")],
)
def test_unreadable_file(text: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that is missing, not YAML or not a mapping is refused in one sentence that names it."""
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))

    with pytest.raises(SettingsError, match=f"^The configuration file {file} {reason}"):
        read(monkeypatch, "--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--mdoel", SECRET], "there is no option --mdoel (did you mean --model?)"),
        ([f"--engne={SECRET}"], "there is no option --engne (did you mean --engine?)"),
        ([SECRET], "a checkpoint is given with --model"),
        (["--port"], "argument --port/--server.port: expected one argument"),
    ],
)
def test_unknown_option(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of the command line is one line with status 2, and repeats no value."""
    with pytest.raises(SystemExit) as caught:
        read_sources(arguments)

    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert reason in message
    assert len(message.splitlines()) == 1
    assert SECRET not in message


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` has each setting's option, its own description and its variable."""
    with pytest.raises(SystemExit) as caught:
        read_sources(["--help"])

    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert all(f"--{name}" in printed and env_variable(name) in printed for name in SETTING_NAMES)
    assert "Longest sequence that is scored, in tokens" in printed
    assert "default: None" not in printed


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--dtype", "float31"]])
def test_an_answer_without_heavy_imports(arguments: list[str]) -> None:
    """Help, version and errors of settings come before torch, transformers, Ray or even rich are imported."""
    script = (
        "import json, sys\n"
        "from service.launch.command import main\n"
        "try: main(json.loads(sys.argv[1]))\n"
        "except SystemExit: pass\n"
        "print(sorted({'ray', 'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )

    answer = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)], capture_output=True, text=True, check=True, timeout=60
    )

    assert answer.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("option", ["--model", "--port", "--log", "--config", "--check"])
def test_an_empty_value_on_the_command_line_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option with the value of an unset shell variable does not silently serve the demo model."""
    with pytest.raises(SystemExit) as ended:
        read_sources([option, ""])

    assert ended.value.code == 2
    assert f"{option} has an empty value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: /my/checkpoint", "model .file .*: it must be a mapping"),
        ("model:", "model .file .*: it must be a mapping"),
        ("Model: {path: x}", "Model .file .* is not a setting .did you mean model"),
        ("3: x", "3 .file .* is not a setting"),
        ("model: {path: a}\nmodel: {path: b}", "the key model stands twice .line 2"),
        ("model: {path: a, path: b}", "the key path stands twice .line 1"),
        ("[" * 20_000, "is not YAML"),
        ("limits: {deadline_s: .inf}", "limits.deadline_s"),
    ],
    ids=["no-section", "null-section", "case", "number", "duplicate-section", "duplicate-key", "deep", "infinite"],
)
def test_a_malformed_file_is_refused_whatever_other_sources_say(text: str, message: str, tmp_path: Path) -> None:
    """Sections are checked before the sources are merged, so that no part of a file is lost silently."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)

    with pytest.raises(SettingsError, match=message):
        read_sources(["--config", str(file), "--dtype", "float32"])


def test_variables_of_kubernetes_services_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets them in every pod for a Service named ``reward``; a misspelt setting is still found."""
    for name in ("REWARD_SERVICE_HOST", "REWARD_PORT", "REWARD_PORT_8000_TCP_ADDR", "REWARD_API_SERVICE_PORT_HTTP"):
        monkeypatch.setenv(name, "10.0.0.1")
    read_sources([])

    monkeypatch.setenv("REWARD_SERVR__PORT", "1")
    with pytest.raises(SettingsError, match="REWARD_SERVR__PORT"):
        read_sources([])


def test_the_configuration_variable_follows_the_rules_of_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may be in lower case, and empty it counts as not set."""
    file = tmp_path / "settings.yaml"
    file.write_text("server: {port: 9000}")
    monkeypatch.setenv("REWARD_CONFIG", "")
    assert read_sources([])[0].server.port == DEFAULTS.server.port

    monkeypatch.delenv("REWARD_CONFIG")
    monkeypatch.setenv("reward_config", str(file))
    assert read_sources([])[0].server.port == 9000
