"""`python -m virgo.cli`: the command line without its script."""

from __future__ import annotations

import sys

from virgo.cli import main

sys.exit(main())
