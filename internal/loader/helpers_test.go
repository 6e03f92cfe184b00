package loader_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/manifest"
)

const repo = "registry.example.com/test/image"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newLayer(t testing.TB, s fixture.LayerSpec) *fixture.Layer {
	t.Helper()
	l, err := fixture.NewLayer(s)
	must(t, err)
	return l
}

func text(t testing.TB, s string) *fixture.Layer {
	t.Helper()
	return newLayer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "etc/text", Data: s}}})
}

func imageOf(t testing.TB, layers ...*fixture.Layer) *fixture.Image {
	t.Helper()
	img, err := fixture.NewImage(fixture.ImageSpec{OCI: true, Layers: layers})
	must(t, err)
	return img
}

// A run is a partition, a store, and what was reported.
type run struct {
	testing.TB
	dir    string
	store  *store
	images []manifest.Image
	jobs   int    // 0: 2
	read   func() // when all is read

	mu     sync.Mutex
	events []loader.Event
	sum    loader.Summary
	err    error
}

func newRun(t testing.TB) *run { return &run{TB: t, dir: t.TempDir(), store: newStore()} }

// add stages an image, pinned, with the edits, and returns what the set says of it.
func (r *run) add(img *fixture.Image, edits ...fixture.Edit) manifest.Image {
	r.Helper()
	return r.addStage(repo, fixture.Stage{Compression: fixture.None, Edits: edits}, img)
}

func (r *run) addStage(ref string, s fixture.Stage, img *fixture.Image) manifest.Image {
	r.Helper()
	ref = img.Ref(ref)
	s.Name = fmt.Sprintf("image-%d_v1.tar", len(r.images))
	_, err := s.Write(r.dir, ref, img)
	must(r.TB, err)
	return r.list(ref)
}

// list puts a reference on the list; its archive is the next image-N.
func (r *run) list(ref string) manifest.Image {
	r.Helper()
	entries, _, err := manifest.ParseList(strings.NewReader(ref+"\n"), "list")
	if err != nil || len(entries) != 1 {
		r.Fatalf("%s: %v", ref, err)
	}
	of := manifest.Image{Ref: entries[0].Ref, Digest: entries[0].Digest, Listed: fmt.Sprintf("image-%d:v1", len(r.images))}
	r.images = append(r.images, of)
	return of
}

// path is where the n-th image is staged.
func (r *run) path(n int) string { return filepath.Join(r.dir, fmt.Sprintf("image-%d_v1.tar", n)) }

// load loads the images in a bubble, and fails if that does not end, leaves goroutines behind, or is reported wrong.
func (r *run) load(ctx context.Context) {
	r.Helper()
	root, err := os.OpenRoot(r.dir)
	must(r.TB, err)
	defer root.Close()
	done, told := make(chan struct{}), atomic.Int32{}
	r.events, r.sum = nil, loader.Summary{}
	if r.jobs == 0 {
		r.jobs = 2
	}
	go func() {
		defer close(done)
		r.sum, r.err = loader.Load(ctx, loader.Options{
			Images: r.images, Partition: &archive.Partition{Root: root, Path: r.dir, Room: &archive.Room{}},
			Store: r.store, Jobs: r.jobs, Report: r.report,
			AllRead: func() {
				told.Add(1)
				if r.read != nil {
					r.read()
				}
			},
		})
	}()
	select {
	case <-done:
	case <-time.After(24 * time.Hour): // of a bubble: nobody can go on
		r.Fatalf("Load has not ended:\n%s", stacks())
	}
	synctest.Wait()
	for _, g := range strings.Split(stacks(), "\n\n") {
		if strings.Contains(g, "internal/loader.") || strings.Contains(g, "internal/archive.") || strings.Contains(g, "readahead.") {
			r.Errorf("a goroutine is left:\n%s", g)
		}
	}
	if r.err == nil {
		if n := told.Load(); n != 1 {
			r.Errorf("told %d times that all is read", n)
		}
		r.wantEvents()
	}
}

func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

func (r *run) report(e loader.Event) {
	if !r.mu.TryLock() {
		r.Error("two events are reported at once")
		return
	}
	defer r.mu.Unlock()
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	if e.State == loader.Loaded && slices.Contains(r.store.unsynced, e.Ref) {
		r.Errorf("%s is loaded, they say, but was not synced", e.Ref)
	}
	r.events = append(r.events, e)
}

// of returns the events of an image.
func (r *run) of(img manifest.Image) (events []loader.Event) {
	for _, e := range r.events {
		if e.Ref == img.Ref && e.State != loader.Summed {
			events = append(events, e)
		}
	}
	return events
}

// end is the last event of an image.
func (r *run) end(img manifest.Image) loader.Event {
	r.Helper()
	events := r.of(img)
	if len(events) == 0 {
		r.Fatalf("no event of %s", img.Ref)
	}
	return events[len(events)-1]
}

// wantEvents fails unless the events make sense: each image has one end, which is its last event, after it was
// started; the summary is the last of all and says the same; and what is said to be in the store is there.
func (r *run) wantEvents() {
	r.Helper()
	ends := map[loader.State]int{}
	for _, img := range r.images {
		started := false
		events := r.of(img)
		for i, e := range events {
			last := i == len(events)-1
			switch e.State {
			case loader.Started:
				if started || i > 0 || last {
					r.Errorf("%s: started is event %d of %d", img.Ref, i, len(events))
				}
				started = true
			case loader.Retrying:
				if !started || last || e.Err == nil || e.Reason == "" {
					r.Errorf("%s: %+v", img.Ref, e)
				}
			case loader.Loaded, loader.Present, loader.Failed:
				ends[e.State]++
				if !last || e.State == loader.Loaded && !started || e.State == loader.Present && started {
					r.Errorf("%s: %s is event %d of %d", img.Ref, e.State, i, len(events))
				}
				if failed := e.State == loader.Failed; failed != (e.Err != nil) || failed != (e.Reason != "") {
					r.Errorf("%s: %s with error %v, reason %q", img.Ref, e.State, e.Err, e.Reason)
				}
			default:
				r.Errorf("%s: event %q", img.Ref, e.State)
			}
			if e.Summary != nil || e.Bytes < 0 || e.Took < 0 {
				r.Errorf("%s: %+v", img.Ref, e)
			}
		}
		if len(events) == 0 {
			r.Errorf("%s has no event", img.Ref)
		} else if last := events[len(events)-1].State; last == loader.Loaded || last == loader.Present {
			r.store.whole(r.TB, img)
		}
	}
	last := r.events[len(r.events)-1]
	if last.State != loader.Summed || last.Summary == nil || *last.Summary != r.sum {
		r.Errorf("the last event is %+v, want the summary %+v", last, r.sum)
	}
	if n := slices.IndexFunc(r.events, func(e loader.Event) bool { return e.State == loader.Summed }); n != len(r.events)-1 {
		r.Errorf("the summary is event %d of %d", n, len(r.events))
	}
	if s := r.sum; s.Images != len(r.images) || s.Images != s.Loaded+s.Present+s.Failed ||
		s.Loaded != ends[loader.Loaded] || s.Present != ends[loader.Present] || s.Failed != ends[loader.Failed] {
		r.Errorf("summary %+v, events say %v of %d images", s, ends, len(r.images))
	}
}

// wantLoaded fails unless these images are loaded.
func (r *run) wantLoaded(images ...manifest.Image) {
	r.Helper()
	for _, img := range images {
		if e := r.end(img); e.State != loader.Loaded {
			r.Errorf("%s: %s: %v", img.Listed, e.State, e.Err)
		}
	}
}

// wantFailed fails unless an image has failed for a reason, and is not in the store.
func (r *run) wantFailed(img manifest.Image, reason archive.Reason) {
	r.Helper()
	if e := r.end(img); e.State != loader.Failed || e.Reason != reason {
		r.Errorf("%s: %s (%q): %v, want %q", img.Listed, e.State, e.Reason, e.Err, reason)
	}
	r.store.absent(r.TB, img)
}

// count is how many events of a state an image has.
func (r *run) count(img manifest.Image, state loader.State) (n int) {
	for _, e := range r.of(img) {
		if e.State == state {
			n++
		}
	}
	return n
}

// wantStaged fails unless each layer was staged so often.
func (r *run) wantStaged(want int, layers ...*fixture.Layer) {
	r.Helper()
	for _, l := range layers {
		if got := r.store.stages[l.DiffID]; got != want {
			r.Errorf("layer %s was staged %d times, want %d", l.DiffID, got, want)
		}
	}
}
