package loader_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/loader/storecontract"
	"github.com/precache/precache-agent/internal/manifest"
)

// A store keeps in maps what containers-storage keeps in files: layers by
// their place in a chain, and images by their names. It can be told to fail,
// and to wait.
type store struct {
	ordered bool // takes layers one after the other only

	// Each is called, if set, before the method of that name does anything, without the lock; an error ends the method.
	onPresent, onPrepare, onSync, onUnstage func() error
	onMissing                               func(layers []archive.Layer) error
	onStage, onStaged                       func(diffID digest.Digest) error // onStaged: after the content was read
	onCommit                                func(img *archive.Image) error

	mu       sync.Mutex
	staged   map[digest.Digest]content // by diffID
	layers   map[string]content        // by ID
	images   map[string]*archive.Image
	unsynced []string // names that were given since the last Sync
	stages   map[digest.Digest]int
	asked    int   // images that Missing was asked of
	batches  []int // images in each call of Commit
	unstages int
}

// A content is that of a layer.
type content struct {
	diffID digest.Digest
	size   int64
	synced bool
}

func newStore() *store {
	return &store{staged: map[digest.Digest]content{}, layers: map[string]content{}, images: map[string]*archive.Image{}, stages: map[digest.Digest]int{}}
}

// chain are the IDs of layers, base first.
func chain(layers []archive.Layer) []string {
	ids := make([]string, len(layers))
	parent := ""
	for i, l := range layers {
		parent += "/" + l.DiffID.Encoded()
		ids[i] = parent
	}
	return ids
}

func (s *store) call(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

func (s *store) Present(_ context.Context, images []manifest.Image) ([]bool, error) {
	if err := s.call(s.onPresent); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	present := make([]bool, len(images))
	for i, want := range images {
		img := s.images[want.Ref]
		present[i] = img != nil && (want.Digest == "" || img.Digest == want.Digest || img.InstanceDigest() == want.Digest) &&
			!slices.ContainsFunc(want.Names, func(name string) bool { return s.images[name] == nil || id(s.images[name]) != id(img) })
	}
	return present, nil
}

func id(img *archive.Image) digest.Digest { return digest.FromBytes(img.Config) }

func (s *store) Prepare(context.Context) (bool, error) { return !s.ordered, s.call(s.onPrepare) }

// has reports, with the lock held, whether a content is anywhere, so that it can be copied.
func (s *store) has(d digest.Digest) (content, bool) {
	if c, ok := s.staged[d]; ok {
		return c, true
	}
	for _, c := range s.layers {
		if c.diffID == d {
			return c, true
		}
	}
	return content{}, false
}

func (s *store) Missing(_ context.Context, layers []archive.Layer) (missing []digest.Digest, err error) {
	if s.onMissing != nil {
		if err := s.onMissing(layers); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	for _, l := range layers {
		if _, ok := s.has(l.DiffID); !ok {
			missing = append(missing, l.DiffID)
		}
	}
	return missing, nil
}

func (s *store) Stage(ctx context.Context, d digest.Digest, b *archive.Blob) (int64, error) {
	s.mu.Lock()
	c, ok := s.staged[d]
	s.mu.Unlock()
	if ok {
		return c.size, nil
	}
	n, err := s.read(ctx, d, b)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.staged[d] = content{diffID: d, size: n}
	s.stages[d]++
	return n, nil
}

func (s *store) read(ctx context.Context, d digest.Digest, b *archive.Blob) (n int64, err error) {
	if s.onStage != nil {
		if err := s.onStage(d); err != nil {
			return 0, err
		}
	}
	err = b.Unpack(ctx, func(plain io.Reader, _ archive.Compression) error {
		h := sha256.New()
		if n, err = io.Copy(h, plain); err != nil {
			return err
		}
		if got := digest.NewDigest(digest.SHA256, h); got != d {
			return &archive.Error{Reason: archive.DigestMismatch, Err: fmt.Errorf("content has diffID %s, want %s", got, d)}
		}
		return nil
	})
	if err == nil && s.onStaged != nil {
		err = s.onStaged(d)
	}
	return n, err
}

func (s *store) Unstage() error {
	s.mu.Lock()
	s.unstages++
	s.mu.Unlock()
	if err := s.call(s.onUnstage); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.staged)
	return nil
}

func (s *store) Placed(ctx context.Context, layers []archive.Layer) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, id := range chain(layers) {
		if _, ok := s.layers[id]; !ok {
			return i, nil
		}
	}
	return len(layers), nil
}

func (s *store) Allowed(_ context.Context, img *archive.Image) error {
	if s.onCommit == nil {
		return nil
	}
	return s.onCommit(img)
}

func (s *store) PutLayer(ctx context.Context, layers []archive.Layer, n int, b *archive.Blob) (int64, error) {
	if below, _ := s.Placed(ctx, layers); below != n {
		return 0, fmt.Errorf("layer %d comes, %d are placed", n, below)
	}
	size, err := s.read(ctx, layers[n].DiffID, b)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[chain(layers)[n]] = content{diffID: layers[n].DiffID, size: size}
	s.stages[layers[n].DiffID]++
	return size, nil
}

func (s *store) Sync(ctx context.Context) error {
	if err := s.call(s.onSync); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unsynced = nil
	for d, c := range s.staged {
		c.synced = true
		s.staged[d] = c
	}
	for id, c := range s.layers {
		c.synced = true
		s.layers[id] = c
	}
	return nil
}

// needError names a layer that is missing after all.
type needError struct{ diffID digest.Digest }

func (e needError) Error() string           { return fmt.Sprintf("layer %s is missing", e.diffID) }
func (e needError) Needed() []digest.Digest { return []digest.Digest{e.diffID} }

func (s *store) Commit(ctx context.Context, images []*archive.Image) []error {
	errs := make([]error, len(images))
	s.mu.Lock()
	s.batches = append(s.batches, len(images))
	s.mu.Unlock()
	for i, img := range images {
		if s.onCommit != nil {
			errs[i] = s.onCommit(img)
		}
		if errs[i] == nil {
			errs[i] = ctx.Err()
		}
		if errs[i] == nil {
			errs[i] = s.commit(img)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.layers { // it was moved there
		delete(s.staged, l.diffID)
	}
	return errs
}

func (s *store) commit(img *archive.Image) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	layers := maps.Clone(s.layers)
	for i, id := range chain(img.Layers) {
		d := img.Layers[i].DiffID
		c, ok := layers[id]
		if !ok && !s.ordered {
			c, ok = s.has(d)
		}
		if !ok {
			return needError{d}
		}
		if !c.synced {
			return fmt.Errorf("layer %s is committed before it was synced", d)
		}
		layers[id] = c
	}
	s.layers = layers
	for _, name := range img.Of.AllNames() {
		s.images[name] = img
		s.unsynced = append(s.unsynced, name)
	}
	return nil
}

// whole fails unless an image is in the store, under all its names and with each of its layers.
func (s *store) whole(t testing.TB, of manifest.Image) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range of.AllNames() {
		img := s.images[name]
		if img == nil {
			t.Errorf("%s is not in the store", name)
			continue
		}
		if of.Digest != "" && img.Digest != of.Digest {
			t.Errorf("%s is %s", name, img.Digest)
		}
		for i, id := range chain(img.Layers) {
			if l, ok := s.layers[id]; !ok || l.diffID != img.Layers[i].DiffID {
				t.Errorf("layer %d of %s is not in the store", i, name)
			}
		}
	}
}

// absent fails if any of an image's names is in the store.
func (s *store) absent(t testing.TB, of manifest.Image) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range of.AllNames() {
		if s.images[name] != nil {
			t.Errorf("%s is in the store", name)
		}
	}
}

func TestContract(t *testing.T) {
	for name, ordered := range map[string]bool{"parallel": false, "ordered": true} {
		t.Run(name, func(t *testing.T) {
			storecontract.Run(t, func(*testing.T) loader.Store {
				s := newStore()
				s.ordered = ordered
				return s
			})
		})
	}
}
