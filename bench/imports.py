"""What `import eqm` costs beside `import torch`, and how soon `eqm --help` answers."""

import subprocess
import sys
from pathlib import Path

from bench.timing import alternate, show

PUBLIC = (
    "import eqm; eqm.load, eqm.learn, eqm.sample, eqm.score, eqm.UNet, eqm.NAG, "
    "eqm.open_manifest, eqm.batches"
)


def python(code: str) -> None:
    """Run one line in a fresh interpreter."""
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    """Measure and print."""
    command = str(Path(sys.executable).parent / "eqm")
    sides = {
        "import torch": lambda: python("import torch"),
        "import torch, eqm": lambda: python("import torch, eqm"),
        "import torch, all public names": lambda: python(f"import torch; {PUBLIC}"),
        "eqm --help": lambda: subprocess.run([command, "--help"], check=True, capture_output=True),
    }
    show(alternate(sides, rounds=5), base="import torch")
