"""The README's first lines of Python run as they stand, where it says to run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_ten_lines_of_the_readme_run(tmp_path):
    subprocess.run([sys.executable, "datasets/train.py", "onnx"], cwd=ROOT, check=True, timeout=200, capture_output=True)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    environment = os.environ | {"TETHER_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=ROOT / "datasets" / "models",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[7 7]" in done.stdout
    assert "/v2/models/digits/infer" in done.stdout
