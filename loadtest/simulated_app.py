"""The application with an oracle that takes as long as a model would, for simulations of many replicas and for tests.

Everything but the forward pass is real: HTTP, parsing, tokenization, queue, scattering, diagnostics, answers. The
forward pass is a sleep followed by `oracle_reward`, so any number of replicas share the cores of one machine, and each
reward can be checked.
"""

from __future__ import annotations

from typing import Any

from loadtest.simulated_oracle import simulated_faults
from service.app import RewardReplica, deployment_of
from service.assembly import ServedModel, assemble_oracle
from service.settings import Settings, read_settings

ORACLE = "oracle"
"""Key of the application's arguments that hold what `simulated_faults` takes; the rest is the settings tree."""


class SimulatedReplica(RewardReplica):
    """A replica of the oracle with a delay."""

    async def __init__(self, tree: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        self._oracle: dict[str, Any] = tree.pop(ORACLE, {})
        await super().__init__(tree)

    def assemble(self, settings: Settings) -> ServedModel:
        """Assemble the oracle with the salt, the delay and the faults of the arguments."""
        return assemble_oracle(settings, salt=self._oracle.get("salt", ""), faults=simulated_faults(self._oracle))


simulated_deployment: Any = deployment_of(SimulatedReplica)


def build_app(args: dict[str, Any]) -> Any:
    """Build the application, as `service.app.build_app`.

    Args:
        args: the settings tree, and under ``oracle`` the salt of the rewards and what `simulated_faults` takes.

    Raises:
        SettingsError: a key of the settings is unknown or a value malformed.
    """
    tree = dict(args)
    oracle = tree.pop(ORACLE, {})
    settings = read_settings(tree)
    return simulated_deployment.bind({**settings.model_dump(mode="json"), ORACLE: oracle})
