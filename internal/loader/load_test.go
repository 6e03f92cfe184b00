package loader_test

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/manifest"
)

// bubble runs a test where time passes only when everybody waits: pauses cost nothing, "as soon as nobody can
// go on" is a moment that can be waited for, and a deadlock or a goroutine that is left is found at once.
func bubble(t *testing.T, f func(*testing.T, *run)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newRun(t)) })
}

var jobs = []int{1, 2, 8}

func first(m []fixture.Member) ([]fixture.Member, error) { return fixture.ManifestFirst(m) }

func TestEachLayerOnce(t *testing.T) {
	for _, n := range jobs {
		for name, order := range map[string]fixture.Edit{"first": fixture.ManifestFirst, "last": fixture.ManifestLast, "shuffled": fixture.Shuffled(1)} {
			t.Run(fmt.Sprintf("%d jobs, manifest %s", n, name), func(t *testing.T) {
				bubble(t, func(t *testing.T, r *run) {
					r.jobs = n
					shared := []*fixture.Layer{text(t, "a"), text(t, "b"), text(t, "c")}
					layers := slices.Clone(shared)
					var bytes int64
					for i := range 12 {
						own := text(t, fmt.Sprint(i))
						layers = append(layers, own)
						r.add(imageOf(t, append(slices.Clone(shared), own)...), order)
					}
					for _, l := range layers {
						bytes += l.UncompressedSize
					}
					r.load(t.Context())
					must(t, r.err)
					r.wantLoaded(r.images...)
					r.wantStaged(1, layers...)
					if s := r.sum; s.LayersWritten != 15 || s.LayersShared != 12*4-15 || s.BytesWritten != bytes || s.BytesRead == 0 {
						t.Errorf("summary %+v, want 15 layers of %d bytes written", s, bytes)
					}

					// All of it is there now, and nothing is read or written any more.
					r.load(t.Context())
					must(t, r.err)
					if s := r.sum; s.Present != 12 || s.BytesRead != 0 || s.LayersWritten != 0 || s.LayersShared != 0 {
						t.Errorf("summary of the second run %+v", s)
					}
					r.wantStaged(1, layers...)
				})
			})
		}
	}
}

func TestNothingToLoad(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		r.load(t.Context())
		must(t, r.err)
		if len(r.events) != 1 || r.sum.Images != 0 {
			t.Errorf("%+v", r.events)
		}
	})
}

// Who needs a layer that another worker is extracting does not wait for it: neither for what else is in its archive, nor for the next one.
func TestNobodyWaits(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		shared, a, b, c, d := text(t, "shared"), text(t, "a"), text(t, "b"), text(t, "c"), text(t, "d")
		release := make(chan bool)
		r.store.onStage = func(id digest.Digest) error {
			if id == shared.DiffID {
				<-release
			}
			return nil
		}
		x := r.add(imageOf(t, shared, a), first)
		y := r.add(imageOf(t, shared, b), first)
		z := r.add(imageOf(t, c), first)
		w := r.add(imageOf(t, shared, d), first)
		ended := make(chan bool)
		go func() {
			defer close(ended)
			r.load(t.Context())
		}()
		synctest.Wait()
		r.wantStaged(1, c)
		r.wantStaged(0, shared)
		if n := len(r.store.stages); n != 3 { // all but the shared layer, and what is behind it in one archive
			t.Errorf("%d layers are staged, want 3", n)
		}
		time.Sleep(2 * time.Second) // the committer gathers
		synctest.Wait()
		r.mu.Lock()
		r.wantLoaded(z)
		for _, img := range []manifest.Image{x, y, w} {
			r.store.absent(t, img)
		}
		r.mu.Unlock()
		close(release)
		<-ended
		must(t, r.err)
		r.wantLoaded(x, y, z, w)
		r.wantStaged(1, shared, a, b, c, d)
	})
}

// slowly makes the extraction of a layer take long, so that whoever comes next skips it.
func slowly(layers ...*fixture.Layer) func(digest.Digest) error {
	return func(d digest.Digest) error {
		for _, l := range layers {
			if l.DiffID == d {
				time.Sleep(time.Minute)
			}
		}
		return nil
	}
}

// Of a shared layer some copies are bad: exactly the images that have these fail, in whatever order they come.
func TestBadCopies(t *testing.T) {
	shared, own := text(t, "shared"), []*fixture.Layer{text(t, "1"), text(t, "2"), text(t, "3"), text(t, "4")}
	large := newLayer(t, fixture.LayerSpec{Compression: fixture.None, Entries: []fixture.Entry{{Name: "large", Data: string(make([]byte, 5<<20))}}})
	for _, layer := range []*fixture.Layer{shared, large} {
		for bad := range 1 << len(own) {
			for _, n := range jobs {
				order := fixture.ManifestFirst
				if bad%2 == 1 {
					order = fixture.ManifestLast
				}
				if layer == large && (n == 8 || bad%3 != 0) {
					continue // that many would take long
				}
				t.Run(fmt.Sprintf("%d bytes, bad %04b, %d jobs", layer.Size, bad, n), func(t *testing.T) {
					bubble(t, func(t *testing.T, r *run) {
						r.jobs = n
						r.store.onStage = slowly(layer)
						for i := range own {
							edits := []fixture.Edit{order}
							if bad&(1<<i) != 0 {
								edits = append(edits, fixture.Flip(layer.Digest.Encoded(), layer.Size/2))
							}
							r.add(imageOf(t, layer, own[i]), edits...)
						}
						r.load(t.Context())
						must(t, r.err)
						read := false // a good copy was read before a bad one
						for i, img := range r.images {
							switch e := r.end(img); {
							case bad&(1<<i) == 0:
								r.wantLoaded(img)
								read = true
							case e.State == loader.Loaded && (read || n > 1): // its copy was not needed
							default:
								r.wantFailed(img, archive.DigestMismatch)
							}
						}
						if bad&1 != 0 && n == 1 {
							r.wantFailed(r.images[0], archive.DigestMismatch)
						}
						if bad != 1<<len(own)-1 {
							r.wantStaged(1, layer)
						}
					})
				})
			}
		}
	}
}

// A config that lies about a shared layer makes its own image fail, and no other.
func TestLies(t *testing.T) {
	shared, large := text(t, "shared"), newLayer(t, fixture.LayerSpec{Compression: fixture.None, Entries: []fixture.Entry{{Name: "large", Data: string(make([]byte, 5<<20))}}})
	slow, other := text(t, "slow"), text(t, "other")
	for _, layer := range []*fixture.Layer{shared, large} {
		lie, err := fixture.NewImage(fixture.ImageSpec{Layers: []*fixture.Layer{layer}, DiffIDs: []digest.Digest{other.DiffID}})
		must(t, err)
		twice, err := fixture.NewImage(fixture.ImageSpec{Layers: []*fixture.Layer{other, layer}, DiffIDs: []digest.Digest{layer.DiffID, other.DiffID}})
		must(t, err)
		for _, liar := range []*fixture.Image{lie, twice} {
			for at := range 4 {
				for _, n := range jobs {
					if layer == large && n != 2 {
						continue
					}
					for _, order := range []fixture.Edit{fixture.ManifestFirst, fixture.ManifestLast} {
						bubble(t, func(t *testing.T, r *run) {
							r.jobs = n
							r.store.onStage = slowly(slow)
							inOrder := fixture.Sorted(func(a, b fixture.Member) int { // the slow layer comes first
								return rank(slow, a) - rank(slow, b)
							})
							var bad manifest.Image
							good := []*fixture.Image{imageOf(t, slow, layer), imageOf(t, layer, text(t, "x")), imageOf(t, text(t, "y"), layer)}
							for i := range 4 {
								if i == at {
									bad = r.add(liar, inOrder, order)
								} else {
									r.add(good[0], inOrder, order)
									good = good[1:]
								}
							}
							r.load(t.Context())
							must(t, r.err)
							for _, img := range r.images {
								if img.Ref != bad.Ref {
									r.wantLoaded(img)
								}
							}
							r.wantFailed(bad, archive.DigestMismatch)
							r.wantStaged(1, layer, slow)
						})
					}
				}
			}
		}
	}
}

func rank(l *fixture.Layer, m fixture.Member) int {
	if len(m.Name) >= 64 && m.Name[len(m.Name)-64:] == l.Digest.Encoded() {
		return 0
	}
	return 1
}

// A layer that is missing from an archive may come from another; that it is missing everywhere is the end of all who need it.
func TestMissingLayer(t *testing.T) {
	shared, a, b := text(t, "shared"), text(t, "a"), text(t, "b")
	drop := fixture.Drop(shared.Digest.Encoded())
	for _, n := range jobs {
		for _, order := range []fixture.Edit{fixture.ManifestFirst, fixture.ManifestLast} {
			for _, whole := range []int{-1, 0, 1} {
				bubble(t, func(t *testing.T, r *run) {
					r.jobs = n
					for i, own := range []*fixture.Layer{a, b} {
						edits := []fixture.Edit{order}
						if i != whole {
							edits = append(edits, drop)
						}
						r.add(imageOf(t, shared, own), edits...)
					}
					r.load(t.Context())
					must(t, r.err)
					for i, img := range r.images {
						switch e := r.end(img); {
						case i == whole:
							r.wantLoaded(img)
						case whole >= 0 && e.State == loader.Loaded: // another had it in time
						default:
							r.wantFailed(img, archive.CorruptArchive)
						}
					}
					if whole == 0 && n == 1 {
						r.wantLoaded(r.images...)
					}
				})
			}
		}
	}
}

// One bad image never stops the others, whatever is bad about it.
func TestBadImages(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		for _, n := range jobs {
			bubble(t, func(t *testing.T, r *run) {
				r.jobs, r.store.ordered = n, ordered
				base := text(t, "base")
				img := func(s string) *fixture.Image { return imageOf(t, base, text(t, s)) }
				var good []manifest.Image
				bad := map[string]archive.Reason{}
				add := func(want archive.Reason, of manifest.Image) {
					bad[of.Ref] = want
					good = append(good, r.add(img(fmt.Sprint("good", len(r.images)))))
				}
				good = append(good, r.add(img("good")))
				none := r.list(repo + ":none")
				bad[none.Ref] = archive.MissingArchive
				add(archive.CorruptArchive, r.add(img("a"), fixture.Drop("manifest.json")))
				add(archive.DigestMismatch, r.add(img("b"), fixture.Replace("manifest.json", img("x").Manifest)))
				config := img("c")
				add(archive.CorruptArchive, r.add(config, fixture.Drop(config.ConfigDigest.Encoded())))
				foreign := *text(t, "d")
				foreign.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
				add(archive.Unsupported, r.add(imageOf(t, base, &foreign)))
				cut := r.add(img("e"))
				must(t, fixture.Truncate(r.path(len(r.images)-1), 3000))
				add(archive.CorruptArchive, cut)
				wrong, err := fixture.NewImage(fixture.ImageSpec{Layers: []*fixture.Layer{base, text(t, "f")}, DiffIDs: []digest.Digest{base.DiffID, text(t, "g").DiffID}})
				must(t, err)
				add(archive.DigestMismatch, r.add(wrong))
				empty := r.add(img("h"))
				must(t, os.Truncate(r.path(len(r.images)-1), 0))
				add(archive.CorruptArchive, empty)

				r.load(t.Context())
				must(t, r.err)
				r.wantLoaded(good...)
				for _, img := range r.images {
					if reason, ok := bad[img.Ref]; ok {
						r.wantFailed(img, reason)
						if r.count(img, loader.Retrying) != 0 {
							t.Errorf("%s was tried again", img.Listed)
						}
					}
				}
				if r.sum.Failed != len(bad) {
					t.Errorf("%d have failed, want %d", r.sum.Failed, len(bad))
				}
			})
		}
	}
}

// Every archive format, one content: a second image of the same layers needs nothing.
func TestFormats(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		layers := []*fixture.Layer{text(t, "a"), newLayer(t, fixture.LayerSpec{Compression: fixture.Zstd, Entries: []fixture.Entry{{Name: "b"}}})}
		oci, err := fixture.NewImage(fixture.ImageSpec{OCI: true, Layers: layers})
		must(t, err)
		other, err := fixture.NewImage(fixture.ImageSpec{OCI: true, Arch: "mips64", Layers: []*fixture.Layer{text(t, "other")}})
		must(t, err)
		list, err := fixture.NewList(fixture.ListSpec{OCI: true, Instances: []*fixture.Image{other, oci}})
		must(t, err)
		for i, s := range []fixture.Stage{{}, {Compression: fixture.Zstd}, {Format: fixture.OCILayout}, {Format: fixture.DockerArchive}, {Format: fixture.DockerLegacy}} {
			ref := fmt.Sprint(repo, i)
			if s.Format >= fixture.DockerArchive {
				ref += ":v1"
			}
			r.addStage(ref, s, []*fixture.Image{oci, list}[i%2])
		}
		r.load(t.Context())
		must(t, r.err)
		r.wantLoaded(r.images...)
		r.wantStaged(1, layers...)
		r.wantStaged(0, other.Layers...)
	})
}

var (
	errIO   = &os.PathError{Op: "write", Path: "layer", Err: syscall.EIO}
	errFull = &os.PathError{Op: "write", Path: "layer", Err: syscall.ENOSPC}
)

// What may pass is tried again, after a pause that grows; what does not is not.
func TestStoreFails(t *testing.T) {
	refused := &archive.Error{Reason: archive.Policy, Err: errors.New("refused by policy")}
	for _, tt := range []struct {
		name  string
		err   error
		times int // that it happens; 0: always
		want  archive.Reason
		again int           // retrying events
		pause time.Duration // at least
	}{
		{"passes", errIO, 1, "", 1, 500 * time.Millisecond},
		{"passes late", errIO, 2, "", 2, 1500 * time.Millisecond},
		{"does not pass", errIO, 0, archive.StoreFailed, 2, 1500 * time.Millisecond},
		{"full", errFull, 0, archive.NoSpace, 0, 0},
		{"over quota", fmt.Errorf("wrapped: %w", syscall.EDQUOT), 0, archive.NoSpace, 0, 0},
		{"policy", refused, 0, archive.Policy, 0, 0},
		{"partition fails", &archive.Error{Reason: archive.ReadFailed, Err: errIO}, 1, "", 1, 500 * time.Millisecond},
	} {
		for _, where := range []string{"stage", "staged", "missing", "commit", "sync"} {
			for _, ordered := range []bool{false, true} {
				if ordered && where == "missing" {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/ordered %v", tt.name, where, ordered), func(t *testing.T) {
					bubble(t, func(t *testing.T, r *run) {
						r.store.ordered = ordered
						fail := func() error { return nil }
						s := r.store
						switch where {
						case "stage":
							s.onStage = func(digest.Digest) error { return fail() }
						case "staged":
							s.onStaged = func(digest.Digest) error { return fail() }
						case "missing":
							s.onMissing = func([]archive.Layer) error { return fail() }
						case "commit":
							s.onCommit = func(*archive.Image) error { return fail() }
						case "sync":
							s.onSync = func() error { return fail() }
						}
						n := 0
						fail = func() error {
							if n++; tt.times == 0 || n <= tt.times {
								return tt.err
							}
							return nil
						}
						img := r.add(imageOf(t, text(t, "x")))
						began := time.Now()
						r.load(t.Context())
						must(t, r.err)
						if tt.want == "" {
							r.wantLoaded(img)
						} else if r.wantFailed(img, tt.want); !errors.Is(r.end(img).Err, tt.err) {
							t.Errorf("%v", r.end(img).Err)
						}
						if got := r.count(img, loader.Retrying); got != tt.again {
							t.Errorf("tried again %d times, want %d", got, tt.again)
						}
						if took := time.Since(began); took < tt.pause || took > tt.pause+5*time.Second {
							t.Errorf("took %s, want %s and a little", took, tt.pause)
						}
						if s.unstages != 1 || len(s.staged) != 0 {
							t.Errorf("unstaged %d times, %d layers are left", s.unstages, len(s.staged))
						}
					})
				})
			}
		}
	}
}

// An image that fails in a batch does not keep the others of the batch from being loaded.
func TestBatch(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		base := text(t, "base")
		for i := range 150 {
			r.add(imageOf(t, base, text(t, fmt.Sprint(i))))
		}
		bad := r.images[77]
		refused := &archive.Error{Reason: archive.Policy, Err: errors.New("refused")}
		r.store.onCommit = func(img *archive.Image) error {
			if img.Of.Ref == bad.Ref {
				return refused
			}
			return nil
		}
		r.load(t.Context())
		must(t, r.err)
		for _, img := range r.images {
			if img.Ref == bad.Ref {
				r.wantFailed(img, archive.Policy)
			} else {
				r.wantLoaded(img)
			}
		}
		if n := len(r.store.batches); n > 6 || slices.Max(r.store.batches) > 64 {
			t.Errorf("%d batches: %v", n, r.store.batches)
		}
	})
}

// What the store has lost meanwhile is read again, but not for ever.
func TestNeeded(t *testing.T) {
	for _, times := range []int{1, 2, 1000} {
		bubble(t, func(t *testing.T, r *run) {
			x, y := text(t, "x"), text(t, "y")
			lost, other := r.add(imageOf(t, x, y)), r.add(imageOf(t, x))
			n := 0
			r.store.onCommit = func(img *archive.Image) error {
				if img.Of.Ref == lost.Ref && n < times {
					n++
					r.store.mu.Lock()
					delete(r.store.staged, y.DiffID)
					r.store.mu.Unlock()
					return fmt.Errorf("commit: %w", needError{y.DiffID})
				}
				return nil
			}
			r.load(t.Context())
			must(t, r.err)
			r.wantLoaded(other)
			r.wantStaged(1, x)
			if times == 1000 {
				r.wantFailed(lost, archive.StoreFailed)
				if n > 20 {
					t.Errorf("it was tried %d times", n)
				}
				return
			}
			r.wantLoaded(lost)
			r.wantStaged(1+times, y)
			if r.count(lost, loader.Failed) != 0 {
				t.Error("it failed meanwhile")
			}
		})
	}
}

// What keeps the loader from trying is an error of Load.
func TestLoadFails(t *testing.T) {
	for name, set := range map[string]func(*store, func() error){
		"present": func(s *store, f func() error) { s.onPresent = f },
		"prepare": func(s *store, f func() error) { s.onPrepare = f },
		"unstage": func(s *store, f func() error) { s.onUnstage = f },
	} {
		bubble(t, func(t *testing.T, r *run) {
			img := r.add(imageOf(t, text(t, "x")))
			set(r.store, func() error { return errIO })
			r.load(t.Context())
			if !errors.Is(r.err, errIO) {
				t.Errorf("%s: %v", name, r.err)
			}
			if name == "unstage" { // what was loaded before is loaded
				r.wantLoaded(img)
				r.store.whole(t, img)
			} else if len(r.events) != 0 || len(r.store.stages) != 0 {
				t.Errorf("%s: %+v", name, r.events)
			}
		})
	}
}

// Attempts of an image can be set.
func TestAttempts(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		img := r.add(imageOf(t, text(t, "x")))
		n := 0
		r.store.onStage = func(digest.Digest) error { n++; return errIO }
		root, err := os.OpenRoot(r.dir)
		must(t, err)
		defer root.Close()
		sum, err := loader.Load(t.Context(), loader.Options{Images: r.images, Partition: &archive.Partition{Root: root}, Store: r.store, Attempts: 5})
		must(t, err)
		if n != 5 || sum.Failed != 1 {
			t.Errorf("%d attempts, %+v", n, sum)
		}
		r.store.absent(t, img)
	})
}

// However many images wait, and however large their metadata is, what is held of it is bounded.
func TestMetadataIsBounded(t *testing.T) {
	const size, images = 3 << 20, 14
	padded := func(t *testing.T, layers ...*fixture.Layer) *fixture.Image {
		img, err := fixture.NewImage(fixture.ImageSpec{Layers: layers, EditConfig: func(b []byte) []byte { return append(b, spaces(size)...) }})
		must(t, err)
		return img
	}
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	for _, where := range []string{"for a layer", "for the committer"} {
		t.Run(where, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *run) {
				shared := text(t, "shared")
				for i := range images {
					r.add(padded(t, shared, text(t, fmt.Sprint(i))), first)
				}
				release, once := make(chan bool), atomic.Bool{}
				block := func() error {
					if !once.Swap(true) {
						<-release
					}
					return nil
				}
				if where == "for a layer" {
					r.store.onStage = func(d digest.Digest) error {
						if d == shared.DiffID {
							return block()
						}
						return nil
					}
				} else {
					r.store.onSync = block
				}
				before := heap()
				ended := make(chan bool)
				go func() {
					defer close(ended)
					r.load(t.Context())
				}()
				synctest.Wait()
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if n := heap() - before; n > 34<<20 { // all of them take 42 MiB
					t.Errorf("%d MiB are held", n>>20)
				}
				r.store.mu.Lock()
				asked := r.store.asked
				r.store.mu.Unlock()
				if where == "for a layer" && asked < images-1 {
					t.Errorf("%d images were looked at while one layer took long", asked)
				}
				close(release)
				<-ended
				must(t, r.err)
				r.wantLoaded(r.images...)
				r.wantStaged(1, shared)
			})
		})
	}
}

// spaces is white space, which JSON allows.
func spaces(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = ' '
	}
	return b
}

// A store that takes layers in order gets them so, one at a time, however they stand in the archive.
func TestOrdered(t *testing.T) {
	for seed := range uint64(6) {
		bubble(t, func(t *testing.T, r *run) {
			r.jobs, r.store.ordered = 8, true
			var at atomic.Int32
			r.store.onStage = func(digest.Digest) error {
				if at.Add(1) > 1 {
					t.Error("two layers at once")
				}
				time.Sleep(time.Millisecond)
				at.Add(-1)
				return nil
			}
			a, b, c := text(t, "a"), text(t, "b"), text(t, "c")
			r.add(imageOf(t, a, b, c), fixture.Shuffled(seed))
			r.add(imageOf(t, a, b, text(t, "d"), a), fixture.Shuffled(seed+1))
			r.add(imageOf(t, b, c), fixture.Shuffled(seed+2))
			none := r.add(imageOf(t), fixture.Shuffled(seed))
			missing := r.add(imageOf(t, a, text(t, "e"), c), fixture.Shuffled(seed), fixture.Drop(text(t, "e").Digest.Encoded()))
			r.load(t.Context())
			must(t, r.err)
			r.wantLoaded(r.images[:3]...)
			r.wantLoaded(none)
			r.wantFailed(missing, archive.CorruptArchive)
			if got := r.store.stages; got[a.DiffID] != 2 || got[b.DiffID] != 2 || got[c.DiffID] != 2 {
				t.Errorf("layers were put %v", got)
			}
			if r.sum.LayersWritten != 7 {
				t.Errorf("%+v", r.sum)
			}
		})
	}
}

// Of an image that the policy refuses, such a store gets no layer.
func TestOrderedPolicy(t *testing.T) {
	bubble(t, func(t *testing.T, r *run) {
		r.store.ordered = true
		r.store.onCommit = func(*archive.Image) error {
			return &archive.Error{Reason: archive.Policy, Err: errors.New("refused")}
		}
		img := r.add(imageOf(t, text(t, "x")))
		r.load(t.Context())
		must(t, r.err)
		r.wantFailed(img, archive.Policy)
		if len(r.store.layers) != 0 {
			t.Errorf("%d layers were put", len(r.store.layers))
		}
	})
}
