# demo · test · check · format · clean; each sets up what it needs, once.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
export OMP_WAIT_POLICY ?= PASSIVE  # threads that wait must not take the core that the others need
STAMP  := $(VENV)/.complete

.PHONY: demo test check format install clean

install: $(STAMP)

# The stamp is written last, so that a half-made .venv is noticed; pip repairs it, or it is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FinLLM needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@if [ -d $(VENV) ] && ! $(PY) -m pip --version >/dev/null 2>&1; then echo "$(VENV) is broken; making it anew"; rm -rf $(VENV); fi
	@[ -d $(VENV) ] || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 2; }; }
	@echo "Installing packages (minutes, once)"
	@$(call install_packages) || \
	  { echo "pip has failed, see above. If it was the network, make again; else \`make clean\` begins anew"; exit 2; }
	@($(call packages_work)) 2>/dev/null || \
	  { echo "$(VENV) is incomplete; making it anew"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV) && $(call install_packages) && $(call packages_work) && echo "mended"; }
	@touch $@

# pip would compile 20,000 modules on one core, a minute longer. One of torch's is for a later Python, which does no harm.
install_packages = $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]' && \
  { $(PY) -m compileall -qq -j 0 $(VENV)/lib || true; }
packages_work = $(PY) -m pip check --quiet && $(PY) -c 'import torch, transformers, trl, peft, bitsandbytes, datasets, wandb, sklearn'

demo: $(STAMP)
	@$(VENV)/bin/finllm launch recipes/demo.yaml

# The tests on SLURM wait most of their time; the others use it, a file on each core (those of a GPU one after the other).
# One thread each: two would take each other's core.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	@$(PY) -m pytest tests/slurm >.slurm-tests.log 2>&1 & on_slurm=$$!; \
	  $(PY) -m pytest tests --ignore tests/slurm -m 'not gpu' --dist loadfile --no-loadscope-reorder -n logical --maxprocesses 8; here=$$?; \
	  if command -v nvidia-smi >/dev/null; then $(PY) -m pytest tests --ignore tests/slurm -m gpu || here=$$?; fi; \
	  echo "tests/slurm, which ran beside them:"; wait $$on_slurm; there=$$?; cat .slurm-tests.log; \
	  exit $$((here ? here : there))

check: $(STAMP)
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest tests -m 'not slow and not gpu and not slurm'

format: $(STAMP)
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
