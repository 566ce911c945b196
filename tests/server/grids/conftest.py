"""Helpers of these tests, which import them by their names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
