import sys

from diffusers_mcm.cli import main

sys.exit(main())
