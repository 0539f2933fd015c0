"""``reward-serve`` with a fault in its oracle engine: ``python faulty_server.py FAULT OPTION...``.

The fault begins with the first text that holds the byte 0x01, so the warm-up is not affected.
"""

import sys
import time
from collections.abc import Sequence

from service.engines.base import EngineOutput
from service.engines.oracle import RAISE_BYTE, OracleEngine
from service.launch.command import main
from service.records import TokenSequence

_forward = OracleEngine.forward


def forward_with_fault(
    engine: OracleEngine, sequences: Sequence[TokenSequence], *, states: bool = False
) -> EngineOutput:
    if any(RAISE_BYTE in sequence.token_ids for sequence in sequences):
        if sys.argv[1] == "dies":
            raise SystemExit
        time.sleep(float(sys.argv[1]))
    return _forward(engine, sequences, states=states)


if __name__ == "__main__":
    OracleEngine.forward = forward_with_fault  # type: ignore[method-assign, assignment]
    sys.exit(main(sys.argv[2:]))
