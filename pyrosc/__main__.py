"""``python -m pyrosc``."""

import sys

from pyrosc.cli import main

if __name__ == "__main__":
    sys.exit(main())
