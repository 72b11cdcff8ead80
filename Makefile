# Everything is set up in .venv on first use; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/ready

.PHONY: help setup demo test test-all test-faults test-hostile test-published oracles lint peers bench-main bench-encode bench-exactness bench-padding bench-kmeans bench-loader bench-layouts bench-storage bench-rvq bench-dac-rvq bench-assign bench-gpu-rvq bench-lyra pictures docs samples clean

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with wavemill, FAISS for the CPU and the development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wavemill needs Python 3.11 or newer; name one with make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (PyTorch is large: one to five minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dev -e '.[cpu,lyra,models,plots,vad]'
	@touch $(STAMP)

demo: $(STAMP)  ## tokenize the speech that ships with wavemill, read it back, play it back (dataset in demo/)
	@$(BIN)/wavemill demo --to demo

test: $(STAMP)  ## run the tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-all: $(STAMP)  ## run the tests, the slow ones too
	@$(BIN)/python -m pytest -m 'slow or not slow' --timeout 3600

test-faults: $(STAMP)  ## kill, starve, fill up, poison and confuse wavemill; prints the targets and what was reached
	@tally=$$(mktemp); WAVEMILL_TALLY=$$tally $(BIN)/python -m pytest -m 'slow or not slow' --timeout 1800 \
	    -n 4 --dist worksteal tests/faults tests/storage/test_resume.py; status=$$?; \
	    $(BIN)/python tests/faults/report.py $$tally || status=1; rm $$tally; exit $$status

test-hostile: $(STAMP)  ## offer wavemill everything hostile that we know of, the bombs too
	@$(BIN)/python -m pytest -m 'slow or not slow' tests/hostile

test-published: $(STAMP)  ## tokenizers at published sizes, and against the original implementations where `make oracles` ran
	@$(BIN)/python -m pytest -m 'published or oracles' --timeout 3600 -s tests/tokenizers tests/contract

oracles: .venv-oracles/ready  ## make .venv-oracles with the original DAC, EnCodec, SpeechTokenizer and SNAC (5 GB), for make test-published

.venv-oracles/ready: infra/oracles/requirements.txt
	@test -x .venv-oracles/bin/python || $(PYTHON) -m venv .venv-oracles
	@.venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check -r infra/oracles/requirements.txt
	@touch .venv-oracles/ready

lint: $(STAMP)  ## ruff, basedpyright and the layer test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/python -m pytest tests/test_layers.py

bench-encode: $(STAMP)  ## time encoding against the published loops; NAMES="mimi ..." CORPUS=FOLDER
	@$(BIN)/python infra/bench/encode.py $(NAMES) $(if $(CORPUS),--corpus $(CORPUS))

bench-exactness: $(STAMP)  ## codes that differ batched, chunked and in fast mode, at published sizes; NAMES, CORPUS
	@$(BIN)/python infra/bench/exactness.py $(NAMES) $(if $(CORPUS),--corpus $(CORPUS))

bench-padding: $(STAMP)  ## the share of useful samples in batches for a GPU
	@$(BIN)/python infra/bench/padding.py

bench-main: $(STAMP)  ## time the main job; CORPUS=FOLDER for your own recordings
	@$(BIN)/python infra/bench/main_job.py $(CORPUS)

peers: .venv-peers/ready  ## make .venv-peers with what the benches compare with (6 GB)

.venv-peers/ready: infra/bench/peers/requirements.txt constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[models]' datasets
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r infra/bench/peers/requirements.txt
	@touch .venv-peers/ready

bench-loader: .venv-peers/ready  ## tokens a second into packed batches, against webdataset, Hugging Face, litdata, MDS, memmap
	@.venv-peers/bin/python infra/bench/loader.py

bench-layouts: $(STAMP)  ## what each layout costs in the loader, against flatten on the same codes; NAMES="delay ..."
	@$(BIN)/python infra/bench/layouts.py $(NAMES)

bench-kmeans: .venv-peers/ready  ## fit codebooks beside scikit-learn's mini-batch k-means, on speech features; CORPUS=FOLDER
	@.venv-peers/bin/python infra/bench/kmeans.py $(if $(CORPUS),--corpus $(CORPUS))

bench-storage: .venv-peers/ready  ## bytes a code, reading three of eight codebooks, writing
	@.venv-peers/bin/python infra/bench/storage.py

bench-rvq: .venv-peers/ready  ## residual quantization, against transformers' EnCodec and vector-quantize-pytorch
	@OMP_NUM_THREADS=1 .venv-peers/bin/python infra/bench/rvq.py

bench-dac-rvq: .venv-peers/ready  ## DAC's quantizer, against transformers'
	@OMP_NUM_THREADS=1 .venv-peers/bin/python infra/bench/dac_rvq.py

bench-assign: .venv-peers/ready  ## k-means ids of features, against fairseq's formula
	@OMP_NUM_THREADS=1 .venv-peers/bin/python infra/bench/assign.py

bench-gpu-rvq: $(STAMP)  ## residual search and k-means ids on a CUDA device, against transformers' EnCodec and fairseq's formula
	@$(BIN)/python infra/bench/gpu_rvq.py

bench-lyra: $(STAMP)  ## STOI and log-mel distance of Lyra's sound by bit rate; WEIGHTS=FOLDER with its three files, CORPUS
	@$(BIN)/python infra/bench/lyra_quality.py $(WEIGHTS) $(if $(CORPUS),--corpus $(CORPUS))

pictures: $(STAMP)  ## make the pictures of the README and of the layouts again
	@$(BIN)/wavemill demo --to demo
	@$(BIN)/wavemill inspect demo --segment sgc2r7alrzakgqthpolakeszvu --png infra/docs/segment.png
	@$(BIN)/python infra/docs/make_pictures.py demo

docs: $(STAMP)  ## write the docs' tables that mirror the code again
	@$(BIN)/python infra/docs/make_tables.py

samples: $(STAMP)  ## make jobs/samples again (needs espeak-ng)
	@$(BIN)/python infra/samples/make_samples.py

clean:  ## remove .venv and what the tools left
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
