package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/precache/precache-agent/internal/fixture"
)

// wantOurError fails unless err has one of the reasons that damage may have.
func wantOurError(t *testing.T, err error) {
	t.Helper()
	if r := ReasonOf(err); r != CorruptArchive && r != DigestMismatch && r != Unsupported {
		t.Errorf("%v has reason %q", err, r)
	}
}

func wantDescriptor(t *testing.T, d v1.Descriptor) {
	t.Helper()
	if d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256 || d.Size < 0 {
		t.Errorf("accepted descriptor %+v", d)
	}
	if d.Digest.Encoded() == "" || strings.ContainsAny(d.Digest.Encoded(), "/.") {
		t.Errorf("digest %q as a name", d.Digest)
	}
}

func FuzzParseManifest(f *testing.F) {
	img := imageOf(f, text(f, "x"), text(f, "y"))
	oci := newImage(f, fixture.ImageSpec{OCI: true, Layers: img.Layers})
	for _, b := range [][]byte{
		img.Manifest, oci.Manifest, newList(f, fixture.ListSpec{Instances: []*fixture.Image{img}}).Manifest,
		newList(f, fixture.ListSpec{OCI: true, Instances: []*fixture.Image{img, oci}}).Manifest,
		nil, []byte("{}"), []byte("null"), []byte(`[]`), []byte(`{"schemaVersion":1}`), []byte(`{"schemaVersion":2,"manifests":[]}`),
		[]byte(`{"schemaVersion":2,"manifests":[{"platform":{"os":"linux","architecture":"amd64"}}]}`),
		[]byte(`{"schemaVersion":2,"config":{},"layers":[{"digest":"sha256:x"}]}`),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseManifest(b)
		if err != nil {
			wantOurError(t, err)
			return
		}
		if p.list && !slices.Equal([]string{p.config.MediaType, p.config.Digest.String()}, []string{"", ""}) {
			t.Errorf("a list with config %+v", p.config)
		}
		if !p.list && len(p.descs) > maxLayers {
			t.Errorf("%d layers", len(p.descs))
		}
		for _, d := range p.descs {
			wantDescriptor(t, d)
		}
		again := v1.Index{Manifests: p.descs}
		var whole any = &again
		if again.SchemaVersion = 2; again.Manifests == nil {
			again.Manifests = []v1.Descriptor{}
		}
		if !p.list {
			wantDescriptor(t, p.config)
			m := v1.Manifest{Config: p.config, Layers: p.descs}
			m.SchemaVersion, whole = 2, &m
		}
		// What was understood, written down again, is understood in the same way.
		written, err := json.Marshal(whole)
		must(t, err)
		q, err := parseManifest(written)
		if err != nil {
			t.Fatalf("%s: %v", written, err)
		}
		if q.list != p.list || len(q.descs) != len(p.descs) || q.config.Digest != p.config.Digest || q.config.Size != p.config.Size {
			t.Errorf("got %+v, again %+v", p, q)
		}
		for i := range p.descs {
			if x, y := p.descs[i], q.descs[i]; x.Digest != y.Digest || x.Size != y.Size || x.MediaType != y.MediaType {
				t.Errorf("got %+v, again %+v", x, y)
			}
		}
		if d, ok := choose(p.descs); ok && p.list {
			wantDescriptor(t, d)
		}
	})
}

func FuzzDiffIDs(f *testing.F) {
	img := imageOf(f, text(f, "x"), text(f, "y"))
	for _, b := range [][]byte{img.Config, nil, []byte("{}"), []byte("null"), []byte(`{"rootfs":null}`), []byte(`{"rootfs":{}}`),
		[]byte(`{"rootfs":{"diff_ids":[""]}}`), []byte(`{"rootfs":{"diff_ids":["sha512:` + strings.Repeat("a", 128) + `"]}}`), []byte(`{"rootfs":{"type":"layers","diff_ids":null}}`)} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ids, err := diffIDs(b)
		if err != nil {
			wantOurError(t, err)
			return
		}
		if len(ids) > maxLayers {
			t.Errorf("%d layers", len(ids))
		}
		var descs []v1.Descriptor
		for i, d := range ids {
			wantDescriptor(t, v1.Descriptor{Digest: d})
			descs = append(descs, v1.Descriptor{Digest: digest.FromString(fmt.Sprint(i)), Size: int64(i)})
		}
		layers, err := pair(descs, ids)
		must(t, err)
		for i, l := range layers {
			if l.DiffID != ids[i] || l.Digest != descs[i].Digest || l.Size != int64(i) {
				t.Errorf("layer %d is %+v", i, l)
			}
		}
		if _, err := pair(append(descs, v1.Descriptor{}), ids); ReasonOf(err) != CorruptArchive {
			t.Errorf("one layer too many: %v", err)
		}
	})
}

func FuzzMemberName(f *testing.F) {
	for _, s := range []string{"", ".", "..", "/", "a", "./a", "a/b", "a//b/", "../a", "a/../b", "a/..", "/a", "a\x00b", "..a", "a..", strings.Repeat("a", maxMemberName+1), "a\\..\\b", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := memberName(s)
		if err != nil {
			if ReasonOf(err) != CorruptArchive || strings.ContainsAny(err.Error(), "\x00\n") {
				t.Errorf("%q (%q)", err, ReasonOf(err))
			}
			return
		}
		if name != path.Clean(name) || path.IsAbs(name) || len(name) > maxMemberName || !filepath.IsLocal(name) {
			t.Errorf("%q is accepted as %q", s, name)
		}
		if joined := filepath.Join("/root", name); joined != "/root" && !strings.HasPrefix(joined, "/root/") {
			t.Errorf("%q leads to %s", s, joined)
		}
		if again, err := memberName(name); err != nil || again != name {
			t.Errorf("%q, cleaned again: %q, %v", name, again, err)
		}
	})
}

func FuzzKindOf(f *testing.F) {
	hex := strings.Repeat("0a", 32)
	for _, s := range []string{"", "manifest.json", "a/manifest.json", "index.json", hex, "a/" + hex, "blobs/sha256/" + hex, "blobs/sha512/" + hex, "x/blobs/sha256/" + hex,
		hex + ".manifest.json", "signature-1", "signature-0", "signature-999", "signature-1000", hex + ".signature-2", hex + ".tar", "version", "oci-layout", strings.ToUpper(hex), hex + "\n", "a/sha256/" + hex} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := memberName(s)
		if err != nil {
			return
		}
		k, d := kindOf(name)
		base := path.Base(name)
		if k == isBlob != (d != "" && base == d.Encoded()) {
			t.Errorf("%q is %d, %s", name, k, d)
		}
		if d != "" && (d.Validate() != nil || d.Algorithm() != digest.SHA256 || !strings.HasPrefix(base, d.Encoded())) {
			t.Errorf("%q has digest %q", name, d)
		}
		named := map[kind]bool{isTop: base == "manifest.json", isIndex: base == "index.json",
			isInstance: d != "" && base == d.Encoded()+".manifest.json", isSignature: strings.Contains(base, "signature-")}
		if good, ok := named[k]; ok && !good {
			t.Errorf("%q is %d", name, k)
		}
		// Where an OCI layout and a dir: layout look for a blob, it is one.
		if k == isBlob {
			for _, l := range []*layout{{top: "manifest.json"}, {index: "index.json"}, {top: "a/manifest.json"}, {index: "a/index.json"}} {
				if kind, got := kindOf(l.blobName(d)); kind != isBlob || got != d {
					t.Errorf("%q is %d, %s", l.blobName(d), kind, got)
				}
			}
		}
	})
}

// A watcher takes everything, and looks whether what it is given is what was promised.
type watcher struct {
	t     *testing.T
	img   *Image
	given map[digest.Digest]bool
}

func (w *watcher) Resolved(img *Image) error {
	if w.img != nil {
		w.t.Error("resolved twice")
	}
	w.img = img
	if img.Bytes() > 5*heldInAll {
		w.t.Errorf("the image takes %d bytes", img.Bytes())
	}
	if img.Digest != digest.FromBytes(img.Manifest) || len(img.Layers) > maxLayers {
		w.t.Errorf("resolved as %s, %d layers", img.Digest, len(img.Layers))
	}
	return nil
}

func (w *watcher) Want(d digest.Digest) bool { return !w.given[d] }
func (w *watcher) More() bool                { return len(w.given) < len(w.img.Layers) }

func (w *watcher) Visit(b *Blob) error {
	if w.given[b.Digest] {
		w.t.Errorf("%s is visited twice", b.Digest)
	}
	w.given[b.Digest] = true
	raw, plain := sha256.New(), sha256.New()
	b.r = &hashing{b.r, raw}
	err := b.Unpack(context.Background(), func(r io.Reader, _ Compression) error {
		_, err := io.Copy(plain, io.LimitReader(r, 64*mib))
		return err
	})
	if err != nil {
		wantOurError(w.t, err)
		return err
	}
	sum := raw
	if b.plain {
		sum = plain
	}
	if got := digest.NewDigest(digest.SHA256, sum); got != b.Digest {
		w.t.Errorf("%s was given what has digest %s, and told that it is right", b.Digest, got)
	}
	return nil
}

type hashing struct {
	r io.Reader
	h hash.Hash
}

func (h *hashing) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.h.Write(p[:n])
	return n, err
}

// sums corrects the checksums of a plain tar's headers, or most of what is tried would end there.
func sums(b []byte) []byte {
	b = slices.Clone(b)
	for at := 0; at+512 <= len(b); at += 512 {
		h := b[at : at+512]
		if string(h[257:262]) != "ustar" {
			continue
		}
		copy(h[148:156], "        ")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	}
	return b
}

func FuzzArchive(f *testing.F) {
	dir := f.TempDir()
	x := text(f, "x")
	img := imageOf(f, x, newLayer(f, fixture.LayerSpec{Compression: fixture.Zstd, Entries: []fixture.Entry{{Name: "y"}}}), x)
	list := newList(f, fixture.ListSpec{Instances: []*fixture.Image{img, newImage(f, fixture.ImageSpec{Arch: "mips64", Layers: img.Layers[:1]})}})
	for _, s := range []fixture.Stage{
		{}, {Compression: fixture.None}, {Compression: fixture.Zstd}, {Compression: fixture.XZ}, {Compression: fixture.None, Edits: []fixture.Edit{fixture.ManifestFirst}},
		{Compression: fixture.None, Format: fixture.OCILayout}, {Compression: fixture.None, Format: fixture.DockerArchive}, {Compression: fixture.None, Format: fixture.DockerLegacy},
	} {
		for _, img := range []*fixture.Image{img, list} {
			s.Name = "seed"
			name, err := s.Write(dir, repo+":v1", img)
			must(f, err)
			b, err := os.ReadFile(name)
			must(f, err)
			f.Add(b)
		}
	}
	root, err := os.OpenRoot(dir)
	must(f, err)
	defer root.Close()
	file, of := filepath.Join(dir, "image_v1.tar"), set(f, repo+":v1")
	f.Add(tarOf("manifest.json", "{}"))
	f.Add(pack(f, fixture.Gzip, 0, tarOf("manifest.json", string(img.Manifest), img.ConfigDigest.Encoded(), string(img.Config))))
	f.Fuzz(func(t *testing.T, b []byte) {
		must(t, os.WriteFile(file, sums(b), 0o600))
		p := &Partition{Root: root, Path: dir, Room: &Room{}}
		a, err := p.Find(of)
		must(t, err)
		w := &watcher{t: t, given: map[digest.Digest]bool{}}
		got, err := a.Visit(context.Background(), of, w)
		if err != nil {
			wantOurError(t, err)
		} else if got != w.img {
			t.Errorf("visited %p, resolved %p", got, w.img)
		}
		errs := a.Verify(context.Background(), of)
		for _, err := range errs {
			wantOurError(t, err)
		}
		if err == nil && len(errs) == 0 {
			for _, l := range got.Layers {
				if !w.given[l.Digest] {
					t.Errorf("%s is there, and was not visited", l.Digest)
				}
			}
		}
		wantRoom(t, p.Room)
	})
}

func FuzzDecompress(f *testing.F) {
	data := []byte(strings.Repeat("data", 100))
	for _, c := range compressions {
		b := pack(f, c, 0, data)
		f.Add(b)
		f.Add(append(b, b...))
		f.Add(b[:len(b)-5])
	}
	for _, log := range []int{10, 24, 27} {
		f.Add(zstdFrame(log, data))
	}
	f.Add(append(zstdSkip(10), zstdFrame(20, data)...))
	f.Add(zstdSegment(1<<40, data))
	f.Add(xzDict(f, 24, data))
	f.Fuzz(func(t *testing.T, b []byte) {
		room := &Room{}
		read := func(r io.Reader) (sum digest.Digest, c Compression, err error) {
			z, c, err := decompress(t.Context(), r, &tenant{room: room})
			if err != nil {
				return "", c, err
			}
			defer z.Close()
			h := sha256.New()
			_, err = io.Copy(h, io.LimitReader(z, 16*mib))
			return digest.NewDigest(digest.SHA256, h), c, err
		}
		sum, c, err := read(bytes.NewReader(b))
		if err != nil {
			wantOurError(t, classify(CorruptArchive, err))
		} else if c == None && sum != digest.FromBytes(b) {
			t.Errorf("%d bytes that are not compressed came out as others", len(b))
		}
		// However the input is cut into pieces, the result is the same.
		again, d, err2 := read(&dribble{b: b})
		if c != d || (err == nil) != (err2 == nil) || err == nil && sum != again {
			t.Errorf("got %s, %s, %v, in small pieces %s, %s, %v", c, sum, err, d, again, err2)
		}
		// And the input's own error is never swallowed.
		broken := fault(ReadFailed, "broken")
		if _, _, err := read(io.MultiReader(bytes.NewReader(b), &failing{broken})); err == nil || errors.Is(err, broken) {
			return
		} else if ReasonOf(classify(CorruptArchive, err)) == ReadFailed {
			t.Errorf("%v", err)
		}
		wantRoom(t, room)
	})
}

// dribble gives its bytes in pieces of one to nine.
type dribble struct {
	b []byte
	n int
}

func (d *dribble) Read(p []byte) (int, error) {
	if len(d.b) == 0 {
		return 0, io.EOF
	}
	d.n++
	n := copy(p, d.b[:min(len(d.b), 1+d.n%9)])
	d.b = d.b[n:]
	return n, nil
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }
