"""`python -m sae_utils.sweep`: the command line of `sae_utils.lab.sweep`."""

import sys

from .lab.sweep import main

if __name__ == "__main__":
    sys.exit(main())
