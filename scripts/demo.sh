#!/bin/sh
# Set up, then a seed and two peers on this machine learn real text together. Words are passed on: `sh scripts/demo.sh --seconds 60`.
set -eu
cd "$(dirname "$0")/.."
sh scripts/set_up.sh
exec .venv/bin/tscale demo "$@"
