"""`python -m kronpress` is the same as `kronpress`."""

import sys

from kronpress.cli import main

if __name__ == "__main__":
    sys.exit(main())
