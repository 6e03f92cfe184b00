// Package integration tests the agent as a user runs it: the binary, on real stores, beside podman and skopeo,
// whose word on the result counts. It has tests only.
package integration
