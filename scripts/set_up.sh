#!/bin/sh
# Find Python 3.11 or newer, then let set_up.py make .venv (--tests: with what only tests need). PYTHON=/path/to/python chooses another one.
set -eu
cd "$(dirname "$0")/.."

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

for python in "${PYTHON:-}" python3 python python3.14 python3.13 python3.12 python3.11; do
    if [ -n "$python" ] && usable "$python"; then
        exec "$python" scripts/set_up.py "$@"
    fi
done
echo "set-up: Python 3.11 or newer is needed and none was found: install it, or name it with PYTHON=/path/to/python" >&2
exit 1
