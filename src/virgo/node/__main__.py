"""Entry of a node's process: `python -m virgo.node NAME INDEX`; the rest comes from the configuration."""

from __future__ import annotations

import logging
import sys

import uvloop

from virgo import config as configuration
from virgo.errors import VirgoError
from virgo.home import record_path
from virgo.node.daemon import serve, write_failure


def main(arguments: list[str]) -> int:
    """Run the node; 0 after a proper stop, 1 if it could not start."""
    name, index = arguments
    home = configuration.home()
    failure = record_path(home, f"{name}.failure")
    failure.unlink(missing_ok=True)
    try:
        config = configuration.load()
        logging.basicConfig(
            level=config.node.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        uvloop.run(serve(config, name, index=int(index)))
    except VirgoError as error:
        logging.getLogger("virgo.node").critical("node %s cannot go on: %s", name, error)
        write_failure(failure, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
