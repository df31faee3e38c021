"""Entry of a mount's process: `python -m virgo.files.mount`; what to mount stands in the environment."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

from virgo import config as configuration
from virgo.errors import VirgoError
from virgo.files.mount import control
from virgo.files.mount.process import Options
from virgo.home import write_record


def main() -> int:
    """Mount and serve; 0 when it was unmounted, 1 if it could not be mounted."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    options = msgspec.json.decode(os.environ.pop(control.OPTIONS), type=Options)
    failure = Path(os.environ.pop(control.FAILURE))
    try:
        control.run(configuration.home(), options)
    except VirgoError as error:
        logging.getLogger("virgo.files.mount").critical("%s", error)
        write_record(failure, {"error": error.to_line()})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
