"""``reward-serve --runtime local`` with the oracle of a simulation.

    python -m loadtest.simulated_local ORACLE [OPTION OF reward-serve ...]

ORACLE is a JSON object with the salt of the rewards and what `simulated_faults` takes.
"""

from __future__ import annotations

import json
import sys
from functools import partial

from loadtest.simulated_oracle import simulated_faults
from service import assembly
from service.launch.command import main

if __name__ == "__main__":
    oracle = json.loads(sys.argv[1])
    # No setting of the service gives the oracle faults.
    assembly.assemble_oracle = partial(
        assembly.assemble_oracle, salt=oracle.get("salt", ""), faults=simulated_faults(oracle)
    )
    sys.exit(main(["--runtime", "local", *sys.argv[2:]]))
