package loader_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/loader"
)

// What is complete when the context ends is committed, what is staged is kept, and the rest has failed as interrupted.
func TestInterrupted(t *testing.T) {
	for _, n := range jobs {
		for name, make := range map[string]func(context.Context) (context.Context, context.CancelFunc){
			"cancelled": context.WithCancel,
			"deadline": func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, time.Minute)
			},
		} {
			t.Run(fmt.Sprintf("%s, %d jobs", name, n), func(t *testing.T) {
				bubble(t, func(t *testing.T, r *run) {
					r.jobs = n
					ctx, cancel := make(t.Context())
					defer cancel()
					base, slow := text(t, "base"), text(t, "slow")
					whole := r.add(imageOf(t, base), first)
					half := r.add(imageOf(t, base, text(t, "half"), slow), first, fixture.Sorted(func(a, b fixture.Member) int { return rank(slow, b) - rank(slow, a) }))
					waits := r.add(imageOf(t, slow, base), first)
					for i := range 20 {
						r.add(imageOf(t, slow, text(t, fmt.Sprint(i))), first)
					}
					r.store.onStage = func(d digest.Digest) error {
						if d != slow.DiffID {
							return nil
						}
						time.Sleep(time.Second / 2) // the committer gathers still
						cancel()
						return ctx.Err()
					}
					r.load(ctx)
					must(t, r.err)
					r.wantLoaded(whole)
					for _, img := range r.images[1:] {
						r.wantFailed(img, archive.Interrupted)
						if r.count(img, loader.Retrying) != 0 {
							t.Error("tried again after the end")
						}
					}
					if r.store.unstages != 0 {
						t.Error("what was staged was removed")
					}
					r.wantStaged(0, slow)

					// The next run does not do again what this one did.
					before := r.store.stages[base.DiffID]
					r.store.onStage = nil
					r.load(t.Context())
					must(t, r.err)
					r.wantLoaded(half, waits)
					r.wantStaged(before, base)
					r.wantStaged(1, slow, text(t, "half"))
					if r.end(whole).State != loader.Present {
						t.Errorf("%+v", r.end(whole))
					}
				})
			})
		}
	}
}

// A context that has ended before anything: nothing is started, everything is interrupted, unless it is there.
func TestInterruptedBefore(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		there := r.add(imageOf(t, text(t, "x")))
		r.load(t.Context())
		must(t, r.err)
		img := r.add(imageOf(t, text(t, "y")))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r.load(ctx)
		must(t, r.err)
		r.wantFailed(img, archive.Interrupted)
		if r.count(img, loader.Started) != 0 || r.end(there).State != loader.Present {
			t.Errorf("%+v", r.events)
		}
	})
}

// The pause before the next attempt ends with the context.
func TestInterruptedInPause(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		img := r.add(imageOf(t, text(t, "x")))
		r.store.onStage = func(digest.Digest) error { return errIO }
		began := time.Now()
		r.load(ctx)
		must(t, r.err)
		r.wantFailed(img, archive.Interrupted)
		if r.count(img, loader.Retrying) != 1 || time.Since(began) > 400*time.Millisecond {
			t.Errorf("%d times, %s", r.count(img, loader.Retrying), time.Since(began))
		}
	})
}

// A commit that has begun is brought to its end, with a context that has not ended.
func TestInterruptedInCommit(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		ctx, cancel := context.WithCancel(t.Context())
		img := r.add(imageOf(t, text(t, "x")))
		r.store.onCommit = func(*archive.Image) error {
			cancel()
			time.Sleep(time.Second)
			return nil
		}
		r.load(ctx)
		must(t, r.err)
		r.wantLoaded(img)
	})
}

// What fails while the run is interrupted is interrupted, whatever the store made of it.
func TestInterruptedReason(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		bubble(t, func(t *testing.T, r *run) {
			r.store.ordered = ordered
			ctx, cancel := context.WithCancel(t.Context())
			img := r.add(imageOf(t, text(t, "x")))
			r.store.onStage = func(digest.Digest) error {
				cancel()
				return errors.New("helper was killed")
			}
			r.load(ctx)
			must(t, r.err)
			r.wantFailed(img, archive.Interrupted)
			if r.count(img, loader.Retrying) != 0 {
				t.Error("tried again after the end")
			}
			if r.store.unstages != 0 {
				t.Error("what was staged was removed")
			}
		})
	}
}
