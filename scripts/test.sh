#!/bin/sh
# Set up, then style, types, arrows between the rooms, and all tests. Ends with pytest's own summary line. `sh scripts/test.sh -k word` passes words on.
set -eu
cd "$(dirname "$0")/.."
sh scripts/check.sh
exec .venv/bin/python -m coverage run -m pytest "$@"
