"""The command ``reward-serve``: reads its settings, then checks a checkpoint or starts the service on this machine.

It imports no more than the settings until they are valid, so ``--help`` and errors of the command line come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from service.arguments import CommandParser
from service.checkpoints.hub import check_source
from service.errors import SettingsError, StartupError
from service.launch.options import settings_parser
from service.launch.sources import read_sources
from service.settings import Settings, name_as_given

if TYPE_CHECKING:
    from rich.console import Console


def command_parser() -> CommandParser:
    """Return the parser of ``reward-serve``."""
    return settings_parser()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        settings, options = read_sources(arguments)
    except SettingsError as error:
        print(f"reward-serve: {error}", file=sys.stderr)
        return 1

    from rich.console import Console

    from service.launch.supervisor import STOPPED_EARLY, StopRequested, raise_on_stop_signals

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    raise_on_stop_signals()
    try:
        if settings.model.path is not None and not settings.model.is_demo and settings.model.engine != "oracle":
            check_source(settings.model.path)
        if options.check:
            check(settings.served_model(), console)
        elif settings.runtime == "local":
            from service.launch.local import serve_locally

            serve_locally(settings, console, opens_page=options.opens_page)
        else:
            from service.launch.start import serve

            serve(settings, console, opens_page=options.opens_page)
    except StartupError as error:
        console.print(f"reward-serve: {error}", markup=False, style="red")
        return 1
    except StopRequested as stop:
        if not stop.after_ready:
            console.print(STOPPED_EARLY, markup=False)
        return stop.status
    return 0


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
        ("text", served.tokenization.rule.sentence),
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
