# make train   trains configs/digits.py into runs/digits; again: does nothing that is done already
# make test    runs the whole test suite
#
# Both create .venv from the pinned versions first. PYTHON chooses the interpreter (3.10 to 3.13), ACCELERATOR one of
# cpu, gpu and tpu: without it, gpu where nvidia-smi finds one, else cpu.

PYTHON ?= python3
ACCELERATOR ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/$(ACCELERATOR).txt

.PHONY: train test

train: .venv/train-$(ACCELERATOR)
	.venv/bin/python main.py --config=configs/digits.py --workdir=runs/digits

test: .venv/test-$(ACCELERATOR)
	.venv/bin/python -m pytest

.venv/train-$(ACCELERATOR): pyproject.toml requirements/$(ACCELERATOR).txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "Python 3.10 to 3.13 is needed, and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.11" % sys.version_info[:2])'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@# The builds of TensorFlow share one folder: only one of them can be there.
	@if ls .venv/train-* 2>/dev/null | grep -qv -- '-$(ACCELERATOR)$$'; then \
		.venv/bin/python -m pip uninstall --quiet --yes tensorflow tensorflow-cpu tensorflow-tpu; rm -f .venv/train-* .venv/test-*; fi
	$(INSTALL) '.[$(ACCELERATOR)]'
	@touch $@

.venv/test-$(ACCELERATOR): .venv/train-$(ACCELERATOR)
	$(INSTALL) '.[$(ACCELERATOR),test]'
	@touch $@
