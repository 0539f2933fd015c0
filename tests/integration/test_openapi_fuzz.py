"""schemathesis, which is not ours, on the OpenAPI document: no fault, and no answer that the document does not have."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import RunningServer

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
OPTIONS = (
    *("--checks", CHECKS),
    *("--phases", "examples,coverage,fuzzing"),
    *("--max-examples", "15"),
    *("--seed", "1", "--generation-deterministic"),
    "--no-color",
)


@pytest.mark.slow
def test_answers_are_those_of_the_document(local_server: RunningServer) -> None:
    """Examples, boundary values and generated requests for every route get declared statuses, types and bodies."""
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("schemathesis is not installed")
    ended = subprocess.run(
        [command, "run", f"{local_server.url}/openapi.json", *OPTIONS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
