"""The built-in suite of hacks: completions as a policy may write them when it exploits a reward model.

All are derived from clean completions, so that a calibration can evaluate its detectors on the user's own model without
further data. Nothing is scored here.
"""

from __future__ import annotations

from export.calibration.crude_hacks import CRUDE_SETS
from export.calibration.plausible_hacks import PLAUSIBLE_SETS

SUITE = (*CRUDE_SETS, *PLAUSIBLE_SETS)
"""All sets. The family ``near`` is plausible text, which no detector here is expected to detect; it is measured to show
that limit."""
