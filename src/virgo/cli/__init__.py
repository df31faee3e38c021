"""The command line: `virgo VERB`.

    app         the verbs together, and how a command runs
    failures    every way to fail, as one line, a hint and an exit status
    render      tables, sizes, JSON, progress: everything that is printed
    output      the streams that it is printed on
    options     options and arguments that several verbs share
    complete    names for shell completion
    deferred    groups of verbs that are imported when they are used
    up          virgo up
    cloud       virgo down, status, nodes, modules
    data        virgo malloc, set, get, free
    files       virgo ls, cat, put, rm
    trees       virgo cp, tree, stat, df
    mount       virgo mount, umount, mounts
    call        virgo call
    remote      virgo run
    tasks       virgo ps, logs
    tools       virgo doctor, demo, version, systemd-unit
    diagnosis   virgo doctor: runs the checks and shows what they found
    checks      what doctor looks at: the machine
    health      what doctor looks at: the installation and the cloud
    ca, token   virgo ca, virgo token

A verb imports what it needs when it runs, so that `virgo --help` and completion answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Entry of the command `virgo`; exits with the command's status."""
    try:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the shell: `virgo status >&-`
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the process's life
        from virgo.cli.app import run

        return run()
    except KeyboardInterrupt:  # Ctrl-C before, or after, there was anything that could say more
        return 130
