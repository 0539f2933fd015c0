"""The settings tree as plain data: names, special values, error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from service.checkpoints import checkpoint
from service.checkpoints.checkpoint import checkpoint_name, locate_checkpoint
from service.errors import SettingsError
from service.setting_fields import allowed_values, did_you_mean, setting_field, setting_names
from service.settings import ModelSettings, Settings, name_as_given, read_settings


@pytest.mark.parametrize("path", [None, "demo"])
def test_demo_is_the_demo_model(path: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """The path ``demo`` names the demo model, as no path does, also beside a folder of that name."""
    monkeypatch.setattr(checkpoint, "obtain_demo_model", lambda: tmp_path)
    settings = ModelSettings(path=path)

    assert locate_checkpoint(settings) == tmp_path
    assert checkpoint_name(settings) == "demo"


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_bare_on_and_off_in_yaml(text: str, value: str) -> None:
    """YAML reads a bare ``on`` as a boolean; the setting takes it as the word."""
    assert read_settings(yaml.safe_load(f"model: {{kernels: {text}}}")).model.kernels == value


def test_names_are_unique_and_complete() -> None:
    """Every section contributes its settings under its own name."""
    names = list(setting_names(Settings))

    assert len(set(names)) == len(names)
    assert {name.split(".")[0] for name in names} == set(Settings.model_fields)


def test_suggestion() -> None:
    """A name close to a known one is suggested; for others nothing is."""
    assert did_you_mean("model.dtyp", setting_names(Settings)) == " (did you mean model.dtype?)"
    assert did_you_mean("something.else", setting_names(Settings)) == ""


def test_all_errors_are_in_one_sentence() -> None:
    """Every invalid setting is named, once."""
    with pytest.raises(SettingsError) as caught:
        read_settings({"modle": {}, "limits": {"deadline_s": 0}})

    assert str(caught.value) == (
        "The settings are not valid: limits.deadline_s: must be a number above 0 and up to 86,400; "
        "modle: is not a setting (did you mean model?)."
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("limits.deadline_s", "a number above 0 and up to 86,400"),
        ("diagnostics.alpha", "a number above 0 and below 1"),
        ("model.num_threads", "a whole number of at least 1 or null"),
        ("model.pooling", "one of hf, last or null"),
        ("model.cuda_graphs", "true or false or auto"),
        ("model.name", "a text or null"),
        ("batching.deterministic", "true or false"),
    ],
)
def test_allowed_values(name: str, values: str) -> None:
    """The values that a setting takes are said in words, with the ends of its range."""
    field = setting_field(name, Settings)

    assert field is not None
    assert allowed_values(field) == values


def test_sections_and_unknown_names_have_no_field() -> None:
    """Only single settings have values."""
    assert [setting_field(name, Settings) for name in ("model", "model.nope", "nope.name", "nope")] == [None] * 4


def test_checkpoint_is_named_as_given(tmp_path: Path) -> None:
    """A message names what the user gave, not the folder in a cache; a relative folder is left as it is."""
    folder = tmp_path / "snapshot"

    assert name_as_given(f"{folder}/config.json is damaged", folder, ModelSettings(path="owner/name")) == (
        "owner/name/config.json is damaged"
    )
    assert name_as_given(f"{folder} is damaged", folder, ModelSettings()) == "demo is damaged"
    assert name_as_given("The model m lacks it", Path("m"), ModelSettings(path="./m")) == "The model m lacks it"
