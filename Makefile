SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Where Go's own installation instructions put it, for those who have not told their shell.
export PATH := $(PATH):/usr/local/go/bin

# remote: no podman engine. containers_image_openpgp: no GPGME, so no C. exclude_graphdriver_btrfs: no btrfs headers.
TAGS := remote,containers_image_openpgp,exclude_graphdriver_btrfs
export GOFLAGS := $(GOFLAGS) -tags=$(TAGS)

VERSION ?= $(shell cat VERSION)
BINARY  := bin/precache-agent
MAXSIZE := 25165824

# What `make test` and `make fuzz` work on, and for how long.
PKG      ?= ./...
RUN      ?= .
FUZZTIME ?= 60s

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z0-9]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r target text; do printf '  make %-8s %s\n' "$$target" "$$text"; done

.PHONY: demo
demo: ## Stage three sample images, verify them, load them into a throw-away store
	@hack/demo.sh

.PHONY: build
build: ## Build the static binary bin/precache-agent
	@hack/setup.sh build
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -buildid= -X main.version=$(VERSION)' -o $(BINARY) ./cmd/precache-agent
	@hack/check-binary.sh $(BINARY) $(MAXSIZE)

.PHONY: test
test: ## Run all tests with the race detector, then each fuzz target for 5 seconds (PKG=./internal/x RUN=TestX for a part)
	@hack/setup.sh test
	CGO_ENABLED=1 go run ./hack/gotest -race -count=1 -timeout 30m -run '$(RUN)' $(PKG)
ifeq ($(PKG) $(RUN),./... .)
	CGO_ENABLED=0 hack/fuzz.sh 5s ./...
	hack/check-reproducible.sh
endif

.PHONY: e2e
e2e: ## Boot machines with the units and the overrides that the agent generates (part of make test; RUN=TestX for a part)
	@hack/setup.sh test
	CGO_ENABLED=0 go run ./hack/gotest -count=1 -timeout 60m -run '$(RUN)' ./internal/e2e

.PHONY: fuzz
fuzz: ## Run every fuzz target, one after the other (FUZZTIME=60s)
	@hack/setup.sh build
	CGO_ENABLED=0 hack/fuzz.sh $(FUZZTIME) $(PKG)

.PHONY: bench
bench: ## Measure against the loop of tar and skopeo, and against the floor
	@hack/bench.sh

.PHONY: lint
lint: ## Check format, go vet, staticcheck, and the shell scripts if shellcheck is installed
	@hack/setup.sh build
	@out=$$(gofmt -l .); if [ -n "$$out" ]; then echo "not formatted by gofmt:"; echo "$$out"; exit 1; fi
	CGO_ENABLED=0 go vet ./...
	CGO_ENABLED=0 go tool staticcheck ./...
	@if command -v shellcheck >/dev/null; then shellcheck hack/*.sh .ci/run; else echo "shellcheck is not installed: scripts not checked"; fi

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .cache
