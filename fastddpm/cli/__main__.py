"""`python -m fastddpm.cli` is the command `fastddpm`."""

import sys

from fastddpm.cli.command import main

sys.exit(main())
