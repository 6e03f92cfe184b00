package loader

import (
	"context"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
)

// everything is a store in which all is missing, and which remembers what it was told to stage.
type everything struct {
	Store
	staged []digest.Digest
}

func (s *everything) Missing(_ context.Context, layers []archive.Layer) (missing []digest.Digest, _ error) {
	for _, l := range layers {
		missing = append(missing, l.DiffID)
	}
	return missing, nil
}

func (s *everything) Stage(_ context.Context, d digest.Digest, _ *archive.Blob) (int64, error) {
	s.staged = append(s.staged, d)
	return 1, nil
}

// What a blob was wanted as is what it is staged as, even if another image says otherwise in between.
func TestWantThenVisit(t *testing.T) {
	s := &everything{}
	l := &load{o: Options{Store: s}, ctx: t.Context(), layers: map[digest.Digest]*needed{}, blobs: map[digest.Digest]digest.Digest{}}
	l.cond = sync.NewCond(&l.mu)
	blob, truth, lie := digest.FromString("blob"), digest.FromString("truth"), digest.FromString("lie")
	image := func(d digest.Digest) *archive.Image {
		return &archive.Image{Layers: []archive.Layer{{Digest: blob, DiffID: d}}}
	}
	honest, liar, reader := &visitor{l: l, it: &item{}}, &visitor{l: l, it: &item{}}, &visitor{l: l, it: &item{}}
	if err := honest.Resolved(image(truth)); err != nil {
		t.Fatal(err)
	}
	if !reader.Want(blob) || honest.Want(blob) {
		t.Fatal("the layer is wanted once, by whoever has it first")
	}
	if err := liar.Resolved(image(lie)); err != nil {
		t.Fatal(err)
	}
	if err := reader.Visit(&archive.Blob{Digest: blob}); err != nil {
		t.Fatal(err)
	}
	if len(s.staged) != 1 || s.staged[0] != truth || l.layers[truth].state != done || l.layers[lie].state != free {
		t.Errorf("staged %v as %v, want %v", blob, s.staged, truth)
	}
}
