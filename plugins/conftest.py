"""The plugins of this repository are importable in tests whether they are installed or not."""

import sys
from pathlib import Path

sys.path[:0] = map(str, sorted(Path(__file__).parent.glob("mergekit-lowrank-*")))
