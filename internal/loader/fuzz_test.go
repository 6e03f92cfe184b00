package loader_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/manifest"
)

// A script decides what happens in a run: each byte is one decision, and after the last nothing happens any more.
type script struct {
	mu sync.Mutex
	b  []byte
}

// pick is the next decision, below n.
func (s *script) pick(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.b) == 0 {
		return 0
	}
	c := s.b[0]
	s.b = s.b[1:]
	return int(c) % n
}

// alphabet are the layers that the scripted images are made of.
var alphabet = sync.OnceValues(func() (layers []*fixture.Layer, err error) {
	for i, c := range []fixture.Compression{fixture.Gzip, fixture.Zstd, fixture.None, fixture.Gzip, fixture.Gzip} {
		l, err := fixture.NewLayer(fixture.LayerSpec{Compression: c, Entries: []fixture.Entry{{Name: fmt.Sprint(i), Data: fmt.Sprint(i)}}})
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return layers, nil
})

// A fate is what a script does to an image.
type fate struct {
	of     manifest.Image
	good   bool // its archive is whole
	honest bool // and its config tells the truth
}

// stage stages a scripted image.
func (r *run) stage(s *script, layers []*fixture.Layer) fate {
	r.Helper()
	spec := fixture.ImageSpec{OCI: true, Config: v1.ImageConfig{User: fmt.Sprint(len(r.images))}}
	for range s.pick(5) {
		spec.Layers = append(spec.Layers, layers[s.pick(len(layers))])
	}
	edits := [][]fixture.Edit{nil, {fixture.ManifestFirst}, {fixture.ManifestLast}, {fixture.Shuffled(1)}}[s.pick(4)]
	damage := s.pick(8)
	some := func() *fixture.Layer { return spec.Layers[s.pick(len(spec.Layers))] }
	good, honest := true, true
	if len(spec.Layers) > 0 {
		switch damage {
		case 1:
			edits, good = append(slices.Clone(edits), fixture.Flip(some().Digest.Encoded(), 9)), false
		case 2:
			edits, good = append(slices.Clone(edits), fixture.Drop(some().Digest.Encoded())), false
		case 3:
			edits, good = append(slices.Clone(edits), fixture.Cut(some().Digest.Encoded(), 20)), false
		case 4:
			one, other := some(), layers[s.pick(len(layers))]
			for _, l := range spec.Layers {
				d := l.DiffID
				if l == one {
					d = other.DiffID
				}
				spec.DiffIDs = append(spec.DiffIDs, d)
			}
			honest = one == other
		}
	}
	img, err := fixture.NewImage(spec)
	must(r.TB, err)
	switch damage {
	case 5:
		edits, good = append(slices.Clone(edits), fixture.Drop(img.ConfigDigest.Encoded())), false
	case 6:
		edits, good = append(slices.Clone(edits), fixture.Drop("manifest.json")), false
	case 7:
		return fate{of: r.list(img.Ref(fmt.Sprint(repo, len(r.images))))}
	}
	of := r.addStage(fmt.Sprint(repo, len(r.images)), fixture.Stage{Compression: fixture.None, Edits: edits}, img)
	if s.pick(4) == 1 {
		of.Names = []string{fmt.Sprint(repo, len(r.images), ":name")}
		r.images[len(r.images)-1] = of
	}
	return fate{of, good, honest}
}

// FuzzLoad runs the loader on scripted images and a store that fails as scripted. Whatever happens, it ends, leaves no
// goroutine, reports one end of each image and a summary that agrees, and what it says is true of the store.
func FuzzLoad(f *testing.F) {
	for _, b := range [][]byte{
		{},
		{3, 1, 0, 3, 0, 1, 2, 0, 0, 0, 3, 0, 1, 3, 1, 0, 0, 2, 1, 4, 2, 0},
		{5, 2, 0, 4, 0, 1, 2, 3, 2, 1, 1, 0, 4, 0, 1, 2, 4, 1, 0, 0, 3, 0, 0, 0, 0, 2, 0, 4, 1, 1, 1, 1, 2, 4, 1, 0},
		{4, 0, 1, 2, 0, 1, 0, 0, 0, 2, 1, 0, 1, 0, 0, 2, 0, 1, 2, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
		{2, 1, 0, 2, 0, 1, 0, 0, 0, 2, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
		{7, 3, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9},
		[]byte("whatever a person types at a keyboard does as well, for each byte is a decision"),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 300 {
			return
		}
		layers, err := alphabet()
		must(t, err)
		synctest.Test(t, func(t *testing.T) { scripted(t, &script{b: b}, layers) })
	})
}

func scripted(t *testing.T, s *script, layers []*fixture.Layer) {
	r := newRun(t)
	var fates []fate
	images := 1 + s.pick(8)
	r.jobs = 1 + s.pick(4)
	r.store.ordered = s.pick(4) == 1
	for range images {
		fates = append(fates, r.stage(s, layers))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	troubled := false // the store has failed, or the run was interrupted
	lost := false     // the store has lost layers
	happen := func(diffID digest.Digest) error {
		what := s.pick(12)
		if what == 0 {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		switch what {
		case 1:
			troubled = true
			return errIO
		case 2:
			troubled = true
			return errFull
		case 3:
			troubled = true
			return errors.New("something")
		case 4:
			troubled = true
			return &archive.Error{Reason: archive.Policy, Err: errors.New("refused")}
		case 5:
			if diffID != "" {
				troubled, lost = true, true
				return needError{diffID}
			}
		case 6:
			if s.pick(4) == 1 {
				troubled = true
				cancel()
			}
		case 7, 8:
			mu.Unlock()
			time.Sleep(time.Duration(s.pick(100)) * 100 * time.Millisecond)
			mu.Lock()
		}
		return nil
	}
	synced := true // no image was committed and then not synced
	var read atomic.Bool
	r.read = func() { read.Store(true) }
	r.store.onStage = func(d digest.Digest) error {
		mu.Lock()
		if read.Load() && !lost {
			t.Error("a layer is read after all was read")
		}
		mu.Unlock()
		return happen(d)
	}
	r.store.onStaged = happen
	r.store.onMissing = func([]archive.Layer) error { return happen("") }
	r.store.onCommit = func(img *archive.Image) error {
		var d digest.Digest
		if len(img.Layers) > 0 {
			d = img.Layers[s.pick(len(img.Layers))].DiffID
		}
		return happen(d)
	}
	r.store.onSync = func() error {
		err := happen("")
		synced = synced && err == nil
		return err
	}
	r.load(ctx)
	must(t, r.err)
	for _, f := range fates {
		switch e := r.end(f.of); {
		case e.State == loader.Loaded && !f.honest && len(fates) == 1: // no other image has brought the layer that it claims to have
			t.Errorf("%s is loaded, and its config is a lie", f.of.Listed)
		case e.State == loader.Failed && f.good && f.honest && !troubled:
			t.Errorf("%s has failed: %v", f.of.Listed, e.Err)
		case e.State == loader.Failed && synced:
			r.store.absent(t, f.of)
		}
	}
	if !r.store.ordered && !troubled {
		for d, n := range r.store.stages {
			if n > 1 {
				t.Errorf("layer %s was staged %d times", d, n)
			}
		}
	}
	if ctx.Err() == nil && len(r.store.staged) > 0 {
		t.Errorf("%d staged layers are left", len(r.store.staged))
	}

	// A second run, with a store that works, loads all that can be loaded.
	r.store.onStage, r.store.onStaged, r.store.onMissing, r.store.onCommit, r.store.onSync = nil, nil, nil, nil, nil
	r.load(t.Context())
	must(t, r.err)
	for _, f := range fates {
		if e := r.end(f.of); f.good && f.honest && e.State == loader.Failed {
			t.Errorf("%s has failed in the second run: %v", f.of.Listed, e.Err)
		}
	}
}
