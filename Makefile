# One word for each check; the same ones that README.md and .pre-commit-config.yaml name.
.PHONY: lint types fast test
lint:
	ruff format --check . && ruff check .
types:
	mypy
fast:
	pytest -q -m "not slow"
test:
	pytest
