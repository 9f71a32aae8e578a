# Two commands do everything on a machine with git, make and any Python 3.12 or later:
#   make demo   install if needed, sort the simulated recording, say where the report is
#   make test   what continuous integration runs
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OUT ?= demo
export UV_SYSTEM_CERTS ?= 1

.PHONY: help install demo test test-slow docs preview readme export clean lock

help: ## say what each command does
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 18

$(PY):
	@found=; for p in python3.12 python3.13 python3.14 python3 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python; do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$p; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "spike_ppl needs Python 3.12 or later (with its venv module), and none was found on PATH or under pyenv: install one and run make again" >&2; exit 1; fi; \
	echo "environment: making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV)

$(STAMP): constraints.txt settings.ini setup.py pyproject.toml | $(PY)
	@echo "environment: installing the versions of constraints.txt"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt uv
	@$(VENV)/bin/uv pip install -q --python $(PY) -c constraints.txt -b constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv and install everything (the other commands do this by themselves)

demo: $(STAMP) ## sort the simulated recording into ./demo and say where the report is
	@$(VENV)/bin/spike-ppl demo -o $(OUT) --overwrite

test: $(STAMP) ## everything that continuous integration runs
	@$(PY) .ci/steps.py test

test-slow: $(STAMP) ## also the notebook cells and tests marked slow
	@$(PY) .ci/steps.py slow

docs: $(STAMP) ## build the site into _docs/
	@$(PY) .ci/docs.py build

preview: $(STAMP) ## build the site and serve it on this machine
	@$(PY) .ci/docs.py preview

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	@$(PY) .ci/docs.py readme

export: $(STAMP) ## write spike_ppl/ from the notebooks, and clean the notebooks
	@$(VENV)/bin/nbdev-export && $(VENV)/bin/nbdev-clean

lock: $(STAMP) ## resolve constraints.txt again from settings.ini
	@$(PY) .ci/steps.py lock

clean: ## remove what was built (not the environment)
	rm -rf _docs _proc build $(OUT)
