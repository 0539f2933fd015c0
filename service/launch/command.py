"""The command ``reward-serve``: reads its settings, then checks a checkpoint or starts the service on this machine.

It imports no more than the settings until they are valid, so ``--help`` and errors of the command line come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from service.errors import SettingsError, StartupError
from service.launch.sources import read_sources
from service.settings import Settings, name_as_given

if TYPE_CHECKING:
    from rich.console import Console

    from service.launch.supervisor import StopRequested

SIGNAL_STATUS = 128
"""A shell adds it to the number of the signal that ended a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        settings, options = read_sources(arguments)
    except SettingsError as error:
        print(f"reward-serve: {error}", file=sys.stderr)
        return 1

    from rich.console import Console

    from service.launch.start import serve
    from service.launch.supervisor import StopRequested, raise_on_stop_signals

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    raise_on_stop_signals()
    try:
        if options.check:
            check(settings.served_model(), console)
        else:
            serve(settings, console)
    except StartupError as error:
        console.print(f"reward-serve: {error}", markup=False, style="red")
        return 1
    except StopRequested as stop:
        return _status_of(stop, console)
    return 0


def _status_of(stop: StopRequested, console: Console) -> int:
    """The exit status of a command that a signal has stopped: 0 once the service was ready, else that of the signal."""
    if stop.after_ready:
        return 0
    console.print("reward-serve: Stopped before the service was ready.", markup=False)
    return SIGNAL_STATUS + stop.number


def check(settings: Settings, console: Console) -> None:
    """Load the model as a replica would and print what was found: checkpoint, engine, parity with transformers.

    Raises:
        StartupError: the checkpoint is refused, or the engine cannot run it.
    """
    from service.assembly import assemble, open_model
    from service.checkpoints.checkpoint import describe

    opened = open_model(settings.model)
    lines = [name_as_given(line, opened.checkpoint.path, settings.model) for line in describe(opened.checkpoint)]
    served = assemble(settings, opened=opened)
    info = served.info
    facts = [
        ("served as", f"{served.identity.name}, version {served.identity.version}"),
        ("forward", f"{info.forward}, {info.arithmetic} on {info.device}"),
        ("kernels", info.kernels),
        ("providers", ", ".join(info.providers)),
        ("parity", parity_in_words(info.parity)),
        *(("quantization", f"{name}: {value}") for name, value in info.quantization_error.items()),
    ]
    for line in (*lines, *(f"  {label:<18}{fact}" for label, fact in facts if fact)):
        console.print(line, markup=False)


def parity_in_words(parity: Mapping[str, Any]) -> str:
    """Return what the comparison with plain transformers found; empty without one.

    Args:
        parity: as ``/v1/model`` has it in ``engine.parity``.
    """
    if not parity:
        return ""
    difference = parity["max_difference"]
    found = f"equal to transformers within {difference:.1g}" if difference else "bit-identical to transformers"
    found += f" on {parity.get('num_probes') or parity.get('num_texts')} texts"
    if "compared_to" in parity:
        found += f" ({parity['compared_to']})"
    if not parity.get("conclusive", True):
        found += (
            "; this shows little, because rounding alone moves these rewards as far as they differ from each other: "
            "an untrained head, or rewards too close together for this dtype"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
