// Package storage puts images into containers-storage, the store of podman and
// CRI-O, so that the result is the one skopeo would have made.
//
// With the overlay driver, layers are extracted beside the store, any number
// at once and without its lock, and moved into place in batches, parents
// first. Other drivers get one layer after the other through the library.
//
// It is the only package that knows github.com/containers/image and
// github.com/containers/storage. It does not read archives by itself, it does
// not retry, and it does not decide what is loaded.
package storage
