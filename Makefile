# One word for each check; pre-commit runs the first three, and CONTRIBUTING.md explains them.
.PHONY: lint types fast test dist
lint:
	ruff format --check .
	ruff check .
types:
	mypy
fast:
	pytest -q -m "not slow" -n 2 --dist loadfile
test:
	pytest -n 3 --dist worksteal
dist:
	bash .ci/release
