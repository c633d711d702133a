"""``python -m spaperb``."""

import sys

from spaperb.cli import main

if __name__ == "__main__":
    sys.exit(main())
