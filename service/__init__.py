"""The reward-model service: everything that a replica and its start command need."""

from service.version import distribution_version

__version__ = distribution_version()
