# Each target makes the environment it needs (.venv) first. Without make: sh scripts/demo.sh, sh scripts/test.sh.

.PHONY: help demo test check set-up clean

help:
	@echo "make demo     a seed and two peers on this machine learn real text together"
	@echo "make test     style, types, arrows between rooms, all tests"
	@echo "make check    the same without the tests"
	@echo "make set-up   only make .venv"
	@echo "make clean    remove .venv and caches"

demo:
	@sh scripts/demo.sh

test:
	@sh scripts/test.sh

check:
	@sh scripts/check.sh

set-up:
	@sh scripts/set_up.sh

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage build *.egg-info
