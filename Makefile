# make train      checks the machine, then trains configs/digits.py into runs/digits; what is done is not done again
# make lint       checks format, style and types; installs ruff and mypy only
# make test       runs the tests, in about ten minutes on two cores
# make test-slow  runs longer tests, which repeat much of what the others check
# make test-tpu   traces the loops of every config for a TPU that is not there, with TensorFlow's TPU build
# make bench      compares this project with what people would use instead, in about two hours on two cores
#
# They create .venv from pinned versions first. PYTHON chooses the interpreter (3.10 to 3.13), ACCELERATOR an extra of
# pyproject.toml: cpu, gpu, tpu, gpu-jax or tpu-tf; by default gpu if nvidia-smi finds one, else cpu.

PYTHON ?= python3
ACCELERATOR ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/$(ACCELERATOR).txt

# Environments of test-tpu and bench, outside of the repository so that a clean checkout finds them again.
VENVS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/warmstart

.PHONY: train lint test test-slow test-tpu bench

train: .venv/train-$(ACCELERATOR)
	@test -e runs/digits/summary.json || .venv/bin/python main.py --config=configs/digits.py --workdir=runs/digits --mode=check
	.venv/bin/python main.py --config=configs/digits.py --workdir=runs/digits

lint: .venv/lint
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy

test: .venv/test-$(ACCELERATOR)
	.venv/bin/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: .venv/test-$(ACCELERATOR)
	.venv/bin/python -m pytest -n 2 --dist loadfile -m slow

.venv/train-$(ACCELERATOR): pyproject.toml requirements/$(ACCELERATOR).txt
	@$(PYTHON) -c 'import sys; oldest, newest = {"tpu": (11, 13), "gpu-jax": (11, 13), "tpu-tf": (10, 12)}.get("$(ACCELERATOR)", (10, 13)); sys.exit(not (3, oldest) <= sys.version_info[:2] <= (3, newest) and "Python 3.%d to 3.%d is needed for $(ACCELERATOR), and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.11" % (oldest, newest, *sys.version_info[:2]))'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@# The builds of TensorFlow share one folder: only one of them can be there.
	@if ls .venv/train-* 2>/dev/null | grep -qv -- '-$(ACCELERATOR)$$'; then \
		.venv/bin/python -m pip uninstall --quiet --yes tensorflow tensorflow-cpu tensorflow-tpu; rm -f .venv/train-* .venv/test-*; fi
	$(INSTALL) '.[$(ACCELERATOR)]'
	@touch $@

.venv/test-$(ACCELERATOR): .venv/train-$(ACCELERATOR)
	$(INSTALL) '.[$(ACCELERATOR),test]'
	@touch $@

.venv/lint: requirements/lint.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench: .venv/train-$(ACCELERATOR) $(VENVS)/torch/installed
	.venv/bin/python benchmarks/bench.py --torch_python=$(VENVS)/torch/bin/python --output=benchmarks/results/bench.json

$(VENVS)/torch/installed: requirements/torch.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-tpu: $(VENVS)/tpu-tf/installed
	TPU_SKIP_MDS_QUERY=1 TRACE=all $(VENVS)/tpu-tf/bin/python -m pytest -n 2 tests/test_tpu.py tests/diagnostics/test_libtpu.py

$(VENVS)/%/installed: pyproject.toml requirements/%.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "the TPU build of TensorFlow is tested with Python 3.11 and 3.12 only, and $(PYTHON) is %d.%d: name another, as in make test-tpu PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/$*.txt '.[$*,test]'
	@touch $@
