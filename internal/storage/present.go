package storage

import (
	"context"
	"fmt"
	"slices"

	"github.com/containers/storage"

	"github.com/precache/precache-agent/internal/manifest"
)

// Present reports which images are in the store: all their names are one
// image's, it has the digest that the reference pins, and its layers are
// there. The store is read once, whatever the number of images.
func (s *Store) Present(_ context.Context, images []manifest.Image) ([]bool, error) {
	s.lib.Lock()
	defer s.lib.Unlock()
	all, err := s.store.Images()
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	layers, err := s.store.Layers()
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	parents := make(map[string]string, len(layers))
	for _, l := range layers {
		parents[l.ID] = l.Parent
	}
	named := map[string]*storage.Image{}
	for i := range all {
		for _, name := range all[i].Names {
			named[name] = &all[i]
		}
	}
	present := make([]bool, len(images))
	for i, want := range images {
		img := named[want.Ref]
		present[i] = img != nil && stacked(img.TopLayer, parents) &&
			(want.Digest == "" || img.Digest == want.Digest || slices.Contains(img.Digests, want.Digest)) &&
			!slices.ContainsFunc(want.Names, func(name string) bool { return named[name] != img })
	}
	return present, nil
}

// stacked reports whether a layer and all below it are in the store.
func stacked(id string, parents map[string]string) bool {
	for range len(parents) + 1 {
		if id == "" {
			return true
		}
		parent, ok := parents[id]
		if !ok {
			return false
		}
		id = parent
	}
	return false
}
