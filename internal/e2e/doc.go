// Package e2e boots a machine with what the agent's commands generate, and asserts from outside that consumers find their
// images, that the partition is as it was, and that the machine boots whatever happens to the agent. It has tests only.
//
// Real are systemd as PID 1, udev, the kernel, XFS, podman and Ignition; Debian stands in for RHCOS, and small programs
// for the services that consume images (internal/vm/guest).
package e2e
