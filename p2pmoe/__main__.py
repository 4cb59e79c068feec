"""`python -m p2pmoe` is the `p2pmoe` command."""

import sys

from p2pmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
