package loader_test

import (
	"errors"
	"os"
	"testing"
	"testing/synctest"

	"github.com/precache/precache-agent/internal/archive"
)

// When AllRead has been called nothing is read any more: the partition may be gone, even if a commit has to be tried again.
func TestAllRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRun(t)
		a, b := r.add(imageOf(t, text(t, "a"))), r.add(imageOf(t, text(t, "b")))
		bad := r.add(imageOf(t, text(t, "c")))
		must(t, os.Remove(r.path(2)))
		busy := 1
		r.store.onCommit = func(*archive.Image) error {
			if busy--; busy >= 0 {
				return errors.New("store is busy")
			}
			return nil
		}
		calls := 0
		r.read = func() {
			calls++
			must(t, os.Remove(r.path(0)))
			must(t, os.Remove(r.path(1)))
		}
		r.load(t.Context())
		r.wantLoaded(a, b)
		r.wantFailed(bad, archive.MissingArchive)
		if calls != 1 {
			t.Errorf("AllRead was called %d times, want 1", calls)
		}

		calls, r.read = 0, func() { calls++ }
		r.images = r.images[:2]
		r.load(t.Context())
		if calls != 1 {
			t.Errorf("nothing was to be read, AllRead was called %d times, want 1", calls)
		}
	})
}
