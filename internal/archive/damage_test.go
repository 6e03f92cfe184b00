package archive

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/precache/precache-agent/internal/fixture"
)

// A damaged is an archive that is damaged again and again, and the image that was in it.
type damaged struct {
	a    *Archive
	ref  string
	path string
	good []byte
	img  *fixture.Image

	docker bool // it has no manifest of its own
}

func toDamage(t *testing.T, s fixture.Stage) *damaged {
	t.Helper()
	x := newLayer(t, fixture.LayerSpec{Compression: fixture.Zstd, Entries: []fixture.Entry{{Name: "a", Data: string(noise(1, 5<<10))}}})
	y := newLayer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "b", Data: string(noise(2, 10<<10))}}})
	d := &damaged{img: imageOf(t, x, y, x)}
	d.ref = d.img.Ref(repo)
	if d.docker = s.Format == fixture.DockerArchive || s.Format == fixture.DockerLegacy; d.docker {
		d.ref = repo + ":v1"
	}
	path, err := s.Write(t.TempDir(), d.ref, d.img)
	must(t, err)
	d.path = path
	if d.good, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	d.a, _ = find(t, filepath.Dir(path), d.ref)
	return d
}

// read gives the archive other bytes, and fails if that gives anything but
// errors with a reason, or the right image with the right content.
func (d *damaged) read(t *testing.T, what string, b []byte) {
	t.Helper()
	must(t, os.WriteFile(d.path, b, 0o644))
	of := set(t, d.ref)
	v := &taker{}
	img, err := d.a.Visit(t.Context(), of, v)
	switch {
	case err != nil:
		if r := ReasonOf(err); r != CorruptArchive && r != DigestMismatch && r != Unsupported {
			t.Errorf("%s: %v has reason %q", what, err, r)
		}
	case len(img.Missing) > 0: // as an error, for whoever wants the layers
	case d.docker: // nothing pins it; but what it says of its layers has to be true
		v.wantContent(t, img)
	default:
		wantImage(t, img, d.img)
		v.wantContent(t, img)
	}
	for _, verdict := range d.a.Verify(t.Context(), of) {
		if r := ReasonOf(verdict); r != CorruptArchive && r != DigestMismatch && r != Unsupported {
			t.Errorf("%s: verify: %v has reason %q", what, verdict, r)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	wantRoom(t, d.a.part.Room)
}

var damageStages = []fixture.Stage{
	{Compression: fixture.Gzip},
	{Compression: fixture.None},
	{Compression: fixture.Zstd},
	{Compression: fixture.XZ},
	{Compression: fixture.Gzip, Edits: []fixture.Edit{fixture.ManifestFirst}},
	{Compression: fixture.Gzip, Edits: []fixture.Edit{fixture.Shuffled(1)}},
	{Compression: fixture.Gzip, Format: fixture.OCILayout},
	{Compression: fixture.None, Format: fixture.DockerArchive},
	{Compression: fixture.Gzip, Format: fixture.DockerLegacy},
}

func TestTruncated(t *testing.T) {
	for i, s := range damageStages {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			d := toDamage(t, s)
			n := len(d.good)
			for part := range 20 {
				d.read(t, fmt.Sprintf("%d/20", part), d.good[:n*part/20])
			}
			for _, cut := range []int{1, 2, 8, 100, 511, 512, 513, 1023, 1024, 1025} {
				d.read(t, fmt.Sprintf("%d bytes less", cut), d.good[:n-cut])
			}
		})
	}
}

func TestFlipped(t *testing.T) {
	for i, s := range damageStages {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			d := toDamage(t, s)
			r := rand.New(rand.NewPCG(1, uint64(i)))
			places := 200
			if i > 0 {
				places = 40 // the first is what is staged
			}
			for range places {
				at, bit := r.IntN(len(d.good)), r.IntN(8)
				if r.IntN(4) == 0 {
					at = r.IntN(1024) // headers are short
				}
				b := append([]byte(nil), d.good...)
				b[at] ^= 1 << bit
				d.read(t, fmt.Sprintf("bit %d of byte %d of %d", bit, at, len(b)), b)
			}
		})
	}
}

// A part of the archive that stands twice, is missing, or is another's.
func TestSpliced(t *testing.T) {
	for i, s := range damageStages[:4] {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			d := toDamage(t, s)
			r := rand.New(rand.NewPCG(2, uint64(i)))
			for range 15 {
				x, y := r.IntN(len(d.good)), r.IntN(len(d.good))
				x, y = min(x, y)&^511, max(x, y)&^511
				d.read(t, fmt.Sprintf("without %d to %d", x, y), append(append([]byte(nil), d.good[:x]...), d.good[y:]...))
				d.read(t, fmt.Sprintf("%d to %d twice", x, y), append(append([]byte(nil), d.good[:y]...), d.good[x:]...))
			}
		})
	}
}

// A layer that is flipped inside of a sound archive: wherever that is, it is the digest that tells.
func TestFlippedLayer(t *testing.T) {
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip, fixture.Zstd} {
		x := newLayer(t, fixture.LayerSpec{Compression: c, Entries: []fixture.Entry{{Name: "a", Data: string(noise(1, 20<<10))}}})
		y := text(t, "y")
		img := imageOf(t, y, x)
		for part := range int64(12) {
			for _, order := range orders[:3] {
				edits := append([]fixture.Edit{fixture.Flip(x.Digest.Encoded(), part*(x.Size-1)/11)}, order.edits...)
				a, of := stage(t, fixture.Stage{Compression: fixture.None, Edits: edits}, repo, img)
				_, err := take(t, a, of)
				wantReason(t, err, DigestMismatch)
				errs := a.Verify(t.Context(), of)
				if len(errs) != 1 {
					t.Fatalf("verify: %v", errs)
				}
				wantReason(t, errs[0], DigestMismatch)
			}
		}
		for _, size := range []int64{0, 1, 10, 511, x.Size / 2, x.Size - 1} {
			a, of := stage(t, fixture.Stage{Edits: []fixture.Edit{fixture.Cut(x.Digest.Encoded(), size)}}, repo, img)
			_, err := take(t, a, of)
			wantReason(t, err, DigestMismatch)
		}
	}
}

// A layer that is what its digest promises, but no compressed stream: nobody damaged it on the way.
func TestBrokenLayer(t *testing.T) {
	good := newLayer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "a", Data: string(noise(1, 2<<10))}}})
	for _, c := range []fixture.Compression{fixture.Gzip, fixture.Zstd, fixture.XZ} {
		b := pack(t, c, 0, plainOf(t, good))
		for _, broken := range [][]byte{b[:len(b)/2], b[:7], append(append([]byte(nil), b[:len(b)/2]...), noise(1, 999)...)} {
			l := newLayer(t, fixture.LayerSpec{Compression: fixture.None, Tar: readerOf(broken)})
			a, of := stage(t, fixture.Stage{}, repo, imageOf(t, l))
			_, err := take(t, a, of)
			wantReason(t, err, CorruptArchive)
			if errs := a.Verify(t.Context(), of); len(errs) != 0 {
				t.Errorf("verify reads no layer's content, yet: %v", errs)
			}
		}
	}
}
