#!/bin/sh
# Set up, then what needs no test run: ruff (style), mypy (types), import-linter (who may import whom).
set -eu
cd "$(dirname "$0")/.."
sh scripts/set_up.sh --tests
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports
