"""Shells complete the options of all commands."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from service.commands import EXTRAS
from service.launch.completion_command import SHELLS, scripts

ASK = """
source "$1"
complete -p "$2" > /dev/null
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
function_name=$(complete -p "$2" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function_name" "$2" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "reward.bash"
    file.write_text("\n".join(scripts("bash")))
    return file


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (("reward-serve", "--quant"), ["--quantization"]),
        (("reward-serve", "--batching.deter"), ["--batching.deterministic"]),
        (("reward-score", "--re"), ["--replicas", "--resume"]),
        (("reward-score", "--diagnostics", "b"), ["basic"]),
        (("reward-train", "--lora-"), ["--lora-layers", "--lora-rank"]),
        (("reward-completion", "f"), ["fish"]),
    ],
    ids=" ".join,
)
def test_bash_completes(bash_script: Path, words: tuple[str, ...], completed: list[str]) -> None:
    """After the script was read, bash completes options and the values of those that have a choice."""
    bash = shutil.which("bash")
    assert bash is not None
    answer = subprocess.run(
        [bash, "-c", ASK, "ask", str(bash_script), *words], capture_output=True, text=True, check=False, timeout=30
    )

    assert answer.stderr == ""
    assert sorted(answer.stdout.split()) == completed


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_has_all_commands(shell: str, tmp_path: Path) -> None:
    """It names each command, and the shell itself accepts it where it is installed."""
    text = "\n".join(scripts(shell))
    file = tmp_path / "script"
    file.write_text(text)

    assert all(name in text for name in EXTRAS)
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", str(file)], capture_output=True, check=False, timeout=30).returncode == 0
