// Package storecontract holds, as tests, what every [loader.Store] must do. It
// is run against the store that the loader's tests use, and against the real
// one, so that what the loader learns of the one is true of the other.
package storecontract

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/manifest"
)

const repo = "registry.example.com/contract/image"

// Run runs all tests. Each gets an empty store of its own from open, which closes it when the test ends.
func Run(t *testing.T, open func(t *testing.T) loader.Store) {
	for name, test := range map[string]func(*suite){
		"empty":            empty,
		"load":             load,
		"names":            names,
		"tags":             tags,
		"list":             list,
		"no layers":        noLayers,
		"repeated layer":   repeatedLayer,
		"moved layer":      movedLayer,
		"two blobs":        twoBlobs,
		"shared layers":    sharedLayers,
		"incomplete image": incompleteImage,
		"unstage":          unstage,
		"bad layer":        badLayer,
		"cancelled":        cancelled,
		"at once":          atOnce,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			must(t, err)
			t.Cleanup(func() { root.Close() })
			s := &suite{T: t, store: open(t), dir: dir, part: &archive.Partition{Root: root, Path: dir, Room: &archive.Room{}}}
			s.wantPresent(false, manifest.Image{Ref: repo + ":none"}) // may be asked before the store is prepared
			must(t, s.store.Unstage())
			s.parallel, err = s.store.Prepare(t.Context())
			must(t, err)
			again, err := s.store.Prepare(t.Context())
			must(t, err)
			if again != s.parallel {
				t.Errorf("prepared again, parallel is %v", again)
			}
			test(s)
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A suite is one test: a store, and a partition to load from.
type suite struct {
	*testing.T
	store    loader.Store
	parallel bool
	dir      string
	part     *archive.Partition
	images   int
}

func (s *suite) layer(text string, c fixture.Compression) *fixture.Layer {
	s.Helper()
	l, err := fixture.NewLayer(fixture.LayerSpec{Compression: c, Entries: []fixture.Entry{{Name: "etc/"}, {Name: "etc/" + text, Data: text}}})
	must(s.T, err)
	return l
}

func (s *suite) text(text string) *fixture.Layer { return s.layer(text, fixture.Gzip) }

func (s *suite) image(layers ...*fixture.Layer) *fixture.Image {
	s.Helper()
	zstd := slices.ContainsFunc(layers, func(l *fixture.Layer) bool { return l.Compression == fixture.Zstd })
	img, err := fixture.NewImage(fixture.ImageSpec{Layers: layers, OCI: zstd}) // docker's manifests know no zstd
	must(s.T, err)
	return img
}

// A staged is an image on the partition.
type staged struct {
	s    *suite
	a    *archive.Archive
	meta *archive.Image
}

// stage stages an image under a reference; one without tag and digest is pinned. Names are further names.
func (s *suite) stage(ref string, img *fixture.Image, edits []fixture.Edit, names ...string) *staged {
	s.Helper()
	s.images++
	ref = img.Ref(ref)
	of := manifest.Image{Ref: ref, Names: names, Listed: fmt.Sprintf("image-%d:v1", s.images)}
	if _, d, ok := strings.Cut(ref, "@"); ok {
		of.Digest = digest.Digest(d)
	}
	_, err := fixture.Stage{Name: fmt.Sprintf("image-%d_v1.tar", s.images), Edits: edits}.Write(s.dir, ref, img)
	must(s.T, err)
	a, err := s.part.Find(of)
	must(s.T, err)
	meta, err := a.Image(s.Context(), of)
	must(s.T, err)
	return &staged{s, a, meta}
}

// put brings the layers of an image that are missing into the store.
func (i *staged) put() *staged {
	i.s.Helper()
	for n := 0; ; n++ {
		v := &visitor{staged: i}
		_, err := i.a.Visit(i.s.Context(), i.meta.Of, v)
		must(i.s.T, err)
		if len(v.left) == 0 {
			return i
		}
		if n > len(i.meta.Layers) {
			i.s.Fatalf("%d of %d layers are missing still", len(v.left), len(i.meta.Layers))
		}
	}
}

// A visitor puts an image's layers into the store.
type visitor struct {
	*staged
	left []digest.Digest // diffIDs, base first; of an ordered store, the first is the one that can be put
	next int
}

func (v *visitor) Resolved(*archive.Image) error { return v.look() }

func (v *visitor) look() error {
	v.left = nil
	if v.s.parallel {
		missing, err := v.s.store.Missing(v.s.Context(), v.meta.Layers)
		v.left = missing
		return err
	}
	n, err := v.s.store.Placed(v.s.Context(), v.meta.Layers)
	for _, l := range v.meta.Layers[n:] {
		v.left = append(v.left, l.DiffID)
	}
	v.next = n
	return err
}

func (v *visitor) find(blob digest.Digest) (digest.Digest, bool) {
	if !v.s.parallel {
		return "", v.next < len(v.meta.Layers) && v.meta.Layers[v.next].Digest == blob
	}
	for _, l := range v.meta.Layers {
		if l.Digest == blob && slices.Contains(v.left, l.DiffID) {
			return l.DiffID, true
		}
	}
	return "", false
}

func (v *visitor) Want(blob digest.Digest) bool {
	_, ok := v.find(blob)
	return ok
}

func (v *visitor) Visit(b *archive.Blob) error {
	d, _ := v.find(b.Digest)
	var err error
	if v.s.parallel {
		_, err = v.s.store.Stage(v.s.Context(), d, b)
	} else {
		_, err = v.s.store.PutLayer(v.s.Context(), v.meta.Layers, v.next, b)
	}
	return errors.Join(err, v.look())
}

func (v *visitor) More() bool { return len(v.left) > 0 }

// blob calls f with a layer of an image at the reader.
func (i *staged) blob(n int, f func(*archive.Blob)) {
	i.s.Helper()
	want := i.meta.Layers[n].Digest
	_, err := i.a.Visit(i.s.Context(), i.meta.Of, &one{want: want, f: f})
	must(i.s.T, err)
}

// one is a visitor of one layer.
type one struct {
	want digest.Digest
	f    func(*archive.Blob)
	done bool
}

func (o *one) Resolved(*archive.Image) error { return nil }
func (o *one) Want(d digest.Digest) bool     { return !o.done && d == o.want }
func (o *one) More() bool                    { return !o.done }
func (o *one) Visit(b *archive.Blob) error   { o.done = true; o.f(b); return nil }
func (s *suite) sync() {
	s.Helper()
	must(s.T, s.store.Sync(s.Context()))
}

// commit commits images whose layers are there, as the loader does.
func (s *suite) commit(images ...*staged) {
	s.Helper()
	for i, err := range s.tryCommit(images...) {
		if err != nil {
			s.Fatalf("image %d: %v", i, err)
		}
	}
	s.sync()
}

func (s *suite) tryCommit(images ...*staged) []error {
	s.Helper()
	var metas []*archive.Image
	for _, i := range images {
		metas = append(metas, i.meta)
	}
	s.sync()
	errs := s.store.Commit(s.Context(), metas)
	if len(errs) != len(images) {
		s.Fatalf("%d errors for %d images", len(errs), len(images))
	}
	return errs
}

// wantPresent fails unless the store says of images what it should.
func (s *suite) wantPresent(want bool, images ...manifest.Image) {
	s.Helper()
	got, err := s.store.Present(s.Context(), images)
	must(s.T, err)
	if len(got) != len(images) {
		s.Fatalf("%d answers for %d images", len(got), len(images))
	}
	for i := range got {
		if got[i] != want {
			s.Errorf("%s and %q: present is %v, want %v", images[i].Ref, images[i].Names, got[i], want)
		}
	}
}

// wantMissing fails unless exactly these layers are missing, in whatever order.
func (i *staged) wantMissing(want ...*fixture.Layer) {
	i.s.Helper()
	if !i.s.parallel {
		return // there is no such question
	}
	got, err := i.s.store.Missing(i.s.Context(), i.meta.Layers)
	must(i.s.T, err)
	var ids []digest.Digest
	for _, l := range want {
		ids = append(ids, l.DiffID)
	}
	slices.Sort(got)
	slices.Sort(ids)
	if got = slices.Compact(got); !slices.Equal(got, slices.Compact(ids)) {
		i.s.Errorf("missing are %v, want %v", got, ids)
	}
}

// wantPlaced fails unless so many layers are at their place.
func (i *staged) wantPlaced(want int) {
	i.s.Helper()
	got, err := i.s.store.Placed(i.s.Context(), i.meta.Layers)
	must(i.s.T, err)
	if got != want {
		i.s.Errorf("%d layers are placed, want %d", got, want)
	}
}

// wantLoaded fails unless an image is in the store, with nothing of it missing.
func (i *staged) wantLoaded() {
	i.s.Helper()
	i.s.wantPresent(true, i.meta.Of)
	i.wantMissing()
	i.wantPlaced(len(i.meta.Layers))
}

func wantNeeded(t testing.TB, err error, want digest.Digest) {
	t.Helper()
	var needs interface{ Needed() []digest.Digest }
	if !errors.As(err, &needs) || !slices.Contains(needs.Needed(), want) {
		t.Errorf("got %v, want an error that needs %s", err, want)
	}
}

// An empty store has nothing, and can be asked about anything.
func empty(s *suite) {
	x, y := s.text("x"), s.text("y")
	i := s.stage(repo, s.image(x, y, x), nil)
	s.wantPresent(false)
	s.wantPresent(false, i.meta.Of, manifest.Image{Ref: repo + ":none"})
	i.wantMissing(x, y)
	i.wantPlaced(0)
	s.commit()
	s.sync()
	must(s.T, s.store.Unstage())
}

// What was put and committed is there, and committing it again changes nothing.
func load(s *suite) {
	i := s.stage(repo, s.image(s.text("x"), s.text("y"), s.text("z")), nil)
	must(s.T, s.store.Allowed(s.Context(), i.meta))
	i.put()
	i.wantMissing()
	s.wantPresent(false, i.meta.Of)
	s.commit(i)
	i.wantLoaded()
	s.commit(i)
	i.wantLoaded()
	s.commit(i, i)
	must(s.T, s.store.Unstage())
	i.wantLoaded()
}

// An image is present under all its names, or it is not.
func names(s *suite) {
	img := s.image(s.text("x"))
	i := s.stage(repo, img, nil, repo+":one", repo+":two").put()
	s.commit(i)
	i.wantLoaded()
	three := s.stage(repo, img, nil, repo+":one", repo+":three")
	s.wantPresent(false, three.meta.Of)
	s.wantPresent(true, manifest.Image{Ref: repo + ":two"})
	three.wantMissing()
	s.commit(three.put())
	three.wantLoaded()
	i.wantLoaded()

	// A name that belongs to another image moves to the one that was committed last.
	other := s.stage(repo, s.image(s.text("other")), nil, repo+":two").put()
	s.commit(other)
	other.wantLoaded()
	three.wantLoaded()
	s.wantPresent(false, i.meta.Of)
	s.commit(i)
	i.wantLoaded()
	s.wantPresent(false, other.meta.Of)
}

// A tag says nothing of the digest; a pin does.
func tags(s *suite) {
	one, two := s.image(s.text("one")), s.image(s.text("two"))
	i := s.stage(repo+":v1", one, nil).put()
	s.commit(i)
	i.wantLoaded()
	ref := repo + ":v1"
	s.wantPresent(true, manifest.Image{Ref: ref}, manifest.Image{Ref: ref, Digest: one.Digest})
	s.wantPresent(false, manifest.Image{Ref: ref, Digest: two.Digest}, manifest.Image{Ref: repo + ":v2"}, manifest.Image{Ref: repo + "@" + one.Digest.String(), Digest: one.Digest})
	j := s.stage(repo+":v1", two, nil).put()
	s.commit(j)
	j.wantLoaded()
	s.wantPresent(true, manifest.Image{Ref: ref, Digest: two.Digest})
	s.wantPresent(false, manifest.Image{Ref: ref, Digest: one.Digest})
}

// A list is present by its own digest.
func list(s *suite) {
	host := s.image(s.text("host"))
	other, err := fixture.NewImage(fixture.ImageSpec{Arch: "mips64", Layers: []*fixture.Layer{s.text("other")}})
	must(s.T, err)
	img, err := fixture.NewList(fixture.ListSpec{Instances: []*fixture.Image{other, host}})
	must(s.T, err)
	i := s.stage(repo, img, nil).put()
	s.commit(i)
	i.wantLoaded()
	s.commit(i)
	i.wantLoaded()
	// The same instance under its own digest is another name of the same image.
	j := s.stage(repo, host, nil)
	s.wantPresent(false, j.meta.Of)
	j.wantMissing()
	s.commit(j.put())
	j.wantLoaded()
	i.wantLoaded()
}

func noLayers(s *suite) {
	i := s.stage(repo, s.image(), nil).put()
	s.commit(i)
	i.wantLoaded()
}

// A layer may stand twice in one image; it is put once.
func repeatedLayer(s *suite) {
	x, y := s.text("x"), s.text("y")
	i := s.stage(repo, s.image(x, x, y, x), nil).put()
	s.commit(i)
	i.wantLoaded()
}

// A layer may stand at another place in another image, in the same batch or later.
func movedLayer(s *suite) {
	x, y := s.text("x"), s.text("y")
	i, j := s.stage(repo, s.image(x, y), nil).put(), s.stage(repo, s.image(y, x, y), nil)
	j.wantMissing()
	s.commit(i, j.put())
	i.wantLoaded()
	j.wantLoaded()
	z := s.text("z")
	k := s.stage(repo, s.image(z, x), nil)
	k.wantMissing(z)
	s.commit(k.put())
	k.wantLoaded()
}

// The same content may come as two blobs.
func twoBlobs(s *suite) {
	gzip, zstd, none := s.layer("x", fixture.Gzip), s.layer("x", fixture.Zstd), s.layer("x", fixture.None)
	if gzip.DiffID != zstd.DiffID || gzip.Digest == zstd.Digest {
		s.Fatal("not one content in two blobs")
	}
	i, j, k := s.stage(repo, s.image(gzip), nil).put(), s.stage(repo, s.image(zstd), nil), s.stage(repo, s.image(s.text("y"), none), nil)
	j.wantMissing()
	s.commit(i, j.put())
	i.wantLoaded()
	j.wantLoaded()
	s.commit(k.put())
	k.wantLoaded()
}

// What one image put need not be put for the next.
func sharedLayers(s *suite) {
	x, y, z := s.text("x"), s.text("y"), s.text("z")
	i, j := s.stage(repo, s.image(x, y), nil), s.stage(repo, s.image(x, z), nil)
	i.put()
	j.wantMissing(z)
	if !s.parallel {
		j.wantPlaced(1)
	}
	j.put()
	s.commit(j)
	j.wantLoaded()
	s.wantPresent(false, i.meta.Of)
	i.wantMissing()
	s.commit(i)
	i.wantLoaded()
}

// An image of which a layer is missing is not committed, whatever is said; the others of its batch are.
func incompleteImage(s *suite) {
	x, y, z := s.text("x"), s.text("y"), s.text("z")
	good, bad, none := s.stage(repo, s.image(x), nil).put(), s.stage(repo, s.image(x, y), nil), s.stage(repo, s.image(z), nil)
	errs := s.tryCommit(bad, good, none)
	wantNeeded(s.T, errs[0], y.DiffID)
	wantNeeded(s.T, errs[2], z.DiffID)
	if errs[1] != nil {
		s.Errorf("the good one: %v", errs[1])
	}
	s.wantPresent(false, bad.meta.Of, none.meta.Of)
	good.wantLoaded()
	bad.wantMissing(y)
	s.commit(bad.put(), none.put())
	bad.wantLoaded()
	none.wantLoaded()
}

// What is staged can be removed, and put again; what is committed stays.
func unstage(s *suite) {
	if !s.parallel {
		must(s.T, s.store.Unstage())
		return
	}
	x, y := s.text("x"), s.text("y")
	kept := s.stage(repo, s.image(x), nil).put()
	s.commit(kept)
	i := s.stage(repo, s.image(x, y), nil).put()
	i.wantMissing()
	must(s.T, s.store.Unstage())
	must(s.T, s.store.Unstage())
	i.wantMissing(y)
	kept.wantLoaded()
	wantNeeded(s.T, s.tryCommit(i)[0], y.DiffID)
	s.commit(i.put())
	i.wantLoaded()
}

// A layer that is not what it should be leaves nothing, and does not keep a good copy away.
func badLayer(s *suite) {
	x, y := s.text("x"), s.text("y")
	img := s.image(x, y)
	good := s.stage(repo, img, nil)
	flipped := s.stage(repo, img, []fixture.Edit{fixture.Flip(x.Digest.Encoded(), x.Size/2)})
	swapped := s.stage(repo, s.image(y, x), nil)
	put := func(i *staged, layer *fixture.Layer, content *fixture.Layer) (err error) {
		n := slices.IndexFunc(i.meta.Layers, func(l archive.Layer) bool { return l.Digest == content.Digest })
		i.blob(n, func(b *archive.Blob) {
			if s.parallel {
				_, err = s.store.Stage(s.Context(), layer.DiffID, b)
			} else {
				_, err = s.store.PutLayer(s.Context(), good.meta.Layers, 0, b)
			}
		})
		return err
	}
	for what, err := range map[string]error{
		"a flipped layer":  put(flipped, x, x),
		"another's layer":  put(swapped, x, y),
		"and once again":   put(swapped, x, y),
		"flipped, another": put(flipped, x, x),
	} {
		if got := archive.ReasonOf(err); got != archive.DigestMismatch {
			s.Errorf("%s: %v (%q), want %q", what, err, got, archive.DigestMismatch)
		}
	}
	good.wantMissing(x, y)
	good.wantPlaced(0)
	s.commit(good.put())
	good.wantLoaded()
	must(s.T, s.store.Unstage())
}

// What is interrupted is there or not, but never half.
func cancelled(s *suite) {
	x := s.text("x")
	i := s.stage(repo, s.image(x), nil)
	ctx, cancel := context.WithCancel(s.Context())
	cancel()
	var err error
	i.blob(0, func(b *archive.Blob) {
		if s.parallel {
			_, err = s.store.Stage(ctx, x.DiffID, b)
		} else {
			_, err = s.store.PutLayer(ctx, i.meta.Layers, 0, b)
		}
	})
	if err != nil {
		i.wantMissing(x)
		i.wantPlaced(0)
	} else {
		i.wantMissing()
	}
	s.commit(i.put())
	i.wantLoaded()
}

// Layers are staged, and everything is asked, by many at once.
func atOnce(s *suite) {
	base := s.text("base")
	first := s.stage(repo, s.image(base), nil).put()
	var all []*staged
	many := 8
	if !s.parallel {
		many = 2 // each layer takes a process
	}
	for n := range many {
		all = append(all, s.stage(repo, s.image(base, s.text(fmt.Sprint(n)), s.text(fmt.Sprint(n, "b"))), nil))
	}
	var wg sync.WaitGroup
	for _, i := range all {
		if !s.parallel {
			i.put()
			continue
		}
		wg.Go(func() {
			_, err := i.a.Visit(s.Context(), i.meta.Of, &visitor{staged: i})
			if err != nil {
				s.Error(err)
			}
			if _, err := s.store.Present(s.Context(), []manifest.Image{i.meta.Of, first.meta.Of}); err != nil {
				s.Error(err)
			}
		})
	}
	wg.Wait()
	s.commit(append(all, first)...)
	for _, i := range all {
		i.wantLoaded()
	}
}
