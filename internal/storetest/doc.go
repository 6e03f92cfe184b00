// Package storetest is what tests of real stores share: places to make them in (tmpfs, or ext4 or XFS on a
// loop device), podman and skopeo run on them, the comparison of two stores down to the last extended
// attribute, and a check of everything that must hold in one.
//
// It looks at a store's files with code of its own, not with the library that wrote them. Everything it makes
// is gone when the test that asked for it ends, and what a test leaves mounted is an error of that test.
// Only tests import it.
package storetest
