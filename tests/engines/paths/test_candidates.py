"""Forward paths are tried in the order of their speed, each once."""

from __future__ import annotations

import pytest

from service.engines.kernels.bindings import Kernels
from service.engines.paths.base import PathSpec, candidate_paths

KERNELS = Kernels.__new__(Kernels)
"""A placeholder for the compiled CPU kernels, which is not called."""

PLAIN = PathSpec("packed")
SHARED = PathSpec("packed", share_prefixes=True, cascade=True)
CACHED = PathSpec("packed", share_prefixes=True, cascade=True, cache_bytes=9)


def test_optimisations_are_dropped_one_after_the_other() -> None:
    """The cache is dropped first, then shared prefixes with cascade attention; the padded path is last."""
    assert candidate_paths("auto", CACHED) == [CACHED, SHARED, PLAIN, PathSpec("padded")]


def test_paths_on_kernels_are_tried_before_those_without() -> None:
    """Each packed path is tried on the CPU kernels and, after all of those, without them."""
    found = candidate_paths("packed", PathSpec("packed", share_prefixes=True, kernels=KERNELS))

    assert [(spec.share_prefixes, spec.kernels is KERNELS) for spec in found] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]


def test_a_forced_padded_path_is_the_only_one() -> None:
    """It has no optimisations, but still reports that compiled blocks were requested."""
    assert candidate_paths("padded", PathSpec("packed", compiled=True)) == [PathSpec("padded", compiled=True)]


@pytest.mark.parametrize(
    ("spec", "description"),
    [
        (PathSpec("padded"), "padded"),
        (SHARED, "packed with shared prefixes"),
        (CACHED, "packed with shared prefixes and a prefix cache"),
        (PathSpec("packed", kernels=KERNELS), "packed with CPU kernels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_path_is_described_in_words(spec: PathSpec, description: str) -> None:
    """Logs and errors name the path and the optimisations that may be at fault."""
    assert spec.description == description
