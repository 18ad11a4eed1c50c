"""The query expansion's examples run; the shell script's commands are those of the slow end-to-end test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_golden_answer_helps_and_padding_does_not() -> None:
    script = ROOT / "examples" / "qmd" / "score_answers.py"
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split(":")[0]: line for line in done.stdout.splitlines()}
    gains = {name: float(lines[name].rpartition(" ")[2]) for name in ("golden", "padded", "echo")}
    assert gains["golden"] > max(gains["padded"], gains["echo"])


def test_the_script_is_sound_shell() -> None:
    script = ROOT / "examples" / "qmd" / "train_to_gguf.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    named = [word for word in script.read_text().split() if word.startswith("mlx_impl/")]
    assert named and all((ROOT / word).is_file() for word in named)
