import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
# scripts, which import what lies beside them
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
