# make train   trains configs/digits.py into runs/digits; again: does nothing that is done already
# make test    runs the whole test suite
#
# Both create .venv from the pinned versions first. PYTHON chooses the interpreter (3.10 to 3.13), ACCELERATOR one of
# cpu, gpu and tpu, which is found out otherwise.

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
	$(INSTALL) '.[$(ACCELERATOR)]'
	@touch $@

.venv/test-$(ACCELERATOR): .venv/train-$(ACCELERATOR)
	$(INSTALL) '.[$(ACCELERATOR),test]'
	@touch $@
