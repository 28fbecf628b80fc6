"""`python -m inlaid` is `inlaid`."""

import sys

from inlaid.cli import main

if __name__ == "__main__":
    sys.exit(main())
