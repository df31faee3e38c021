#!/bin/sh
# Runs the benchmarks in an environment of their own; arguments go to `python -m benchmarks`.
# The environment holds the peers (requirements.txt) and the project; it is made anew when either changes.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV_BENCH:-.venv-bench}
stamp=$venv/.installed
if [ ! -e "$stamp" ] || [ benchmarks/requirements.txt -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "benchmarks: installing the peers and the project into $venv (some minutes the first time)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --requirement benchmarks/requirements.txt --editable '.[arrays]'
    touch "$stamp"
fi
exec "$venv/bin/python" -m benchmarks "$@"
