"""The checkout that these scripts belong to. Importing this lets a script import vimpac, benchmarks/ and tests/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / folder) for folder in ("", "benchmarks", "tests")]
