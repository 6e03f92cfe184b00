package storage

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containers/image/v5/docker/reference"
	is "github.com/containers/image/v5/storage"
	"github.com/containers/storage"
	"golang.org/x/sys/unix"
)

// Exists reports whether the store has an image under a name, a tag or a
// digest, as `podman image exists` does. It takes no part in the agent's lock
// and changes nothing.
func Exists(o Options, name string) (bool, error) {
	so, err := storeOptions(o)
	if err != nil {
		return false, err
	}
	store, err := storage.GetStore(so)
	if err != nil {
		return false, fmt.Errorf("open store %s: %w", so.GraphRoot, err)
	}
	defer store.Free()
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return false, fmt.Errorf("parse reference: %w", err)
	}
	ref, err := is.Transport.NewStoreReference(store, reference.TagNameOnly(named), "")
	if err != nil {
		return false, fmt.Errorf("name image: %w", err)
	}
	_, _, err = is.ResolveReference(ref)
	if errors.Is(err, storage.ErrImageUnknown) || errors.Is(err, is.ErrNoSuchImage) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for %s: %w", name, err)
	}
	return true, nil
}

// An Info is what a look into the store shows.
type Info struct {
	GraphRoot string
	Driver    string
	Images    int
	Layers    int
	Free      int64  // bytes of the file system that an ordinary user may still take
	Label     string // SELinux context of the layers' folder; "off" if it has none
}

// Look looks into the store, without the agent's lock and without changing anything.
func Look(o Options) (Info, error) {
	so, err := storeOptions(o)
	if err != nil {
		return Info{}, err
	}
	store, err := storage.GetStore(so)
	if err != nil {
		return Info{}, fmt.Errorf("open store %s: %w", so.GraphRoot, err)
	}
	defer store.Free()
	images, err := store.Images()
	if err != nil {
		return Info{}, fmt.Errorf("list images: %w", err)
	}
	layers, err := store.Layers()
	if err != nil {
		return Info{}, fmt.Errorf("list layers: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(so.GraphRoot, &fs); err != nil {
		return Info{}, fmt.Errorf("look at file system of %s: %w", so.GraphRoot, err)
	}
	label, buf := "off", make([]byte, 4096)
	if n, err := unix.Lgetxattr(filepath.Join(so.GraphRoot, so.GraphDriverName), "security.selinux", buf); err == nil {
		label = strings.TrimRight(string(buf[:n]), "\x00")
	}
	return Info{Label: label, GraphRoot: so.GraphRoot, Driver: so.GraphDriverName, Images: len(images), Layers: len(layers), Free: int64(fs.Bavail) * fs.Bsize}, nil
}
