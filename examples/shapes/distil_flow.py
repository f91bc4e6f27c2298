"""examples/train_mcm_distill.py for the flow teacher of the shapes world: the same flags."""

import sys
from pathlib import Path

import flow_teacher  # noqa: F401 - a row of the base models

sys.path.append(str(Path(__file__).parents[1]))

from train_mcm_distill import main

if __name__ == "__main__":
    main()
