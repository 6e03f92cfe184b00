package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/manifest"
)

const repo = "registry.example.com/test/image"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantReason fails unless err has the reason.
func wantReason(t testing.TB, err error, want Reason) {
	t.Helper()
	if err == nil || ReasonOf(err) != want {
		t.Errorf("got %v (%q), want %q", err, ReasonOf(err), want)
	}
}

func newLayer(t testing.TB, s fixture.LayerSpec) *fixture.Layer {
	t.Helper()
	l, err := fixture.NewLayer(s)
	must(t, err)
	return l
}

// text is a layer of one small file.
func text(t testing.TB, s string) *fixture.Layer {
	t.Helper()
	return newLayer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "etc/text", Data: s}}})
}

// noise are n bytes that do not compress.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
	return b
}

// big is a layer whose blob has n bytes of noise and a little more.
func big(t testing.TB, seed uint64, n int) *fixture.Layer {
	t.Helper()
	return newLayer(t, fixture.LayerSpec{Compression: fixture.None, Entries: []fixture.Entry{{Name: "noise", Data: string(noise(seed, n))}}})
}

func newImage(t testing.TB, s fixture.ImageSpec) *fixture.Image {
	t.Helper()
	img, err := fixture.NewImage(s)
	must(t, err)
	return img
}

// imageOf is an image of docker's flavour, unless it has a zstd layer: only OCI manifests know these.
func imageOf(t testing.TB, layers ...*fixture.Layer) *fixture.Image {
	t.Helper()
	zstd := slices.ContainsFunc(layers, func(l *fixture.Layer) bool { return l.Compression == fixture.Zstd })
	return newImage(t, fixture.ImageSpec{Layers: layers, OCI: zstd})
}

func newList(t testing.TB, s fixture.ListSpec) *fixture.Image {
	t.Helper()
	img, err := fixture.NewList(s)
	must(t, err)
	return img
}

// set is the manifest.Image of a reference.
func set(t testing.TB, ref string) manifest.Image {
	t.Helper()
	entries, _, err := manifest.ParseList(strings.NewReader(ref+"\n"), "list")
	if err != nil || len(entries) != 1 {
		t.Fatalf("%s: %v, %v", ref, entries, err)
	}
	e := entries[0]
	return manifest.Image{Ref: e.Ref, Digest: e.Digest, Listed: e.Listed}
}

func partition(t testing.TB, dir string) *Partition {
	t.Helper()
	root, err := os.OpenRoot(dir)
	must(t, err)
	t.Cleanup(func() { root.Close() })
	return &Partition{Root: root, Path: dir, Room: &Room{}}
}

// stage writes an image to a new folder and finds its archive.
func stage(t testing.TB, s fixture.Stage, ref string, img *fixture.Image) (*Archive, manifest.Image) {
	t.Helper()
	dir := t.TempDir()
	ref = img.Ref(ref)
	_, err := s.Write(dir, ref, img)
	must(t, err)
	return find(t, dir, ref)
}

func find(t testing.TB, dir, ref string) (*Archive, manifest.Image) {
	t.Helper()
	of := set(t, ref)
	a, err := partition(t, dir).Find(of)
	must(t, err)
	return a, of
}

// raw writes bytes as the archive of repo:raw, and finds it.
func raw(t testing.TB, data []byte) (*Archive, manifest.Image) {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "image_raw.tar"), data, 0o644))
	return find(t, dir, repo+":raw")
}

// A taker is a Visitor that takes every layer of the image once.
type taker struct {
	known   []digest.Digest             // blobs that are wanted even before the image is known
	none    bool                        // wants nothing but known
	unpack  func(*Blob) ([]byte, error) // nil: reads the plain content
	img     *Image
	got     map[digest.Digest][]byte // plain content, by blob
	order   []string                 // what happened: "resolved", or a blob
	visits  int
	refused []digest.Digest // asked for and not wanted
}

func (v *taker) wanted(d digest.Digest) bool {
	if _, ok := v.got[d]; ok {
		return false
	}
	if slices.Contains(v.known, d) {
		return true
	}
	return !v.none && v.img != nil && slices.ContainsFunc(v.img.Layers, func(l Layer) bool { return l.Digest == d })
}

func (v *taker) Resolved(img *Image) error {
	v.img = img
	v.order = append(v.order, "resolved")
	return nil
}

func (v *taker) Want(d digest.Digest) bool {
	if !v.wanted(d) {
		v.refused = append(v.refused, d)
		return false
	}
	return true
}

func (v *taker) More() bool {
	return slices.ContainsFunc(v.img.Layers, func(l Layer) bool { return v.wanted(l.Digest) })
}

func (v *taker) Visit(b *Blob) error {
	v.visits++
	if !v.wanted(b.Digest) {
		return fmt.Errorf("%s was not wanted", b.Digest)
	}
	v.order = append(v.order, b.Digest.String())
	if v.got == nil {
		v.got = map[digest.Digest][]byte{}
	}
	v.got[b.Digest] = nil
	unpack := v.unpack
	if unpack == nil {
		unpack = func(b *Blob) ([]byte, error) { return plain(context.Background(), b) }
	}
	content, err := unpack(b)
	if err != nil {
		return err
	}
	v.got[b.Digest] = content
	return nil
}

func plain(ctx context.Context, b *Blob) (content []byte, err error) {
	err = b.Unpack(ctx, func(r io.Reader, _ Compression) error {
		content, err = io.ReadAll(r)
		return err
	})
	return content, err
}

// wantContent fails unless v took exactly the image's layers, with the content that their diffIDs name.
func (v *taker) wantContent(t testing.TB, img *Image) {
	t.Helper()
	distinct := map[digest.Digest]bool{}
	for _, l := range img.Layers {
		distinct[l.Digest] = true
		if got := digest.FromBytes(v.got[l.Digest]); got != l.DiffID {
			t.Errorf("layer %s: content has digest %s, want %s", l.Digest, got, l.DiffID)
		}
	}
	if len(v.got) != len(distinct) || v.visits != len(distinct) {
		t.Errorf("%d layers were taken in %d visits, want each of %d once", len(v.got), v.visits, len(distinct))
	}
}

// take visits an archive, taking everything, and returns the first error.
func take(t testing.TB, a *Archive, of manifest.Image) (*Image, error) {
	t.Helper()
	v := &taker{}
	img, err := a.Visit(t.Context(), of, v)
	if err == nil {
		for _, l := range img.Layers {
			if !slices.Contains(img.Missing, l.Digest) && digest.FromBytes(v.got[l.Digest]) != l.DiffID {
				return img, fault(DigestMismatch, "layer %s: content has another diffID", l.Digest)
			}
		}
		if len(img.Missing) > 0 {
			return img, fault(CorruptArchive, "%d layers are missing", len(img.Missing))
		}
	}
	return img, err
}

// A header is one tar header, written byte by byte so that it can lie.
type header struct {
	name string
	size string // the field as it stands; "": that of data
	kind byte   // 0: a regular file
	link string
	data []byte
}

func (h header) bytes() []byte {
	b := make([]byte, 512)
	copy(b, h.name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	if h.size == "" {
		h.size = fmt.Sprintf("%011o", len(h.data))
	}
	copy(b[124:136], h.size)
	copy(b[136:], "00000000000\x00        ") // time, and the checksum as it counts
	b[156] = '0'
	if h.kind != 0 {
		b[156] = h.kind
	}
	copy(b[157:], h.link)
	copy(b[257:], "ustar\x0000")
	if h.kind == tar.TypeGNUSparse {
		copy(b[257:], "ustar  \x00")
		copy(b[483:], "00000000001")
	}
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	b = append(b, h.data...)
	return append(b, make([]byte, -len(h.data)&511)...)
}

// rawTar is a tar of such headers. Without end it is cut after the last one.
func rawTar(end bool, headers ...header) []byte {
	var b []byte
	for _, h := range headers {
		b = append(b, h.bytes()...)
	}
	if end {
		b = append(b, make([]byte, 1024)...)
	}
	return b
}

// base256 is how GNU tar writes a number that has no room in octal.
func base256(n int64) string {
	b := make([]byte, 12)
	binary.BigEndian.PutUint64(b[4:], uint64(n))
	if n < 0 {
		copy(b, "\xff\xff\xff\xff")
	}
	b[0] |= 0x80
	return string(b)
}

// pax is an extended header for the next member.
func pax(records ...string) header {
	var b strings.Builder
	for _, r := range records {
		n := len(r) + 2
		for len(fmt.Sprint(n))+1+len(r)+1 != n {
			n++
		}
		fmt.Fprintf(&b, "%d %s\n", n, r)
	}
	return header{name: "pax", kind: tar.TypeXHeader, data: []byte(b.String())}
}

// tarOf is a plain tar of files, in the order given: name, content, name, content, …
func tarOf(files ...string) []byte {
	var hs []header
	for i := 0; i < len(files); i += 2 {
		hs = append(hs, header{name: files[i], data: []byte(files[i+1])})
	}
	return rawTar(true, hs...)
}

// within runs f, and fails if it has not ended in time: a deadlock is a failure, not the end of the whole test run.
func within(t testing.TB, d time.Duration, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(d):
		buf := new(bytes.Buffer)
		fmt.Fprintf(buf, "not ended after %s\n", d)
		t.Fatal(buf)
	}
}

// peak runs f and returns by how many bytes the live heap grew, at the most, meanwhile.
func peak(f func()) int64 {
	defer debug.SetGCPercent(debug.SetGCPercent(5))
	runtime.GC()
	live := func() int64 {
		s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(s)
		return int64(s[0].Value.Uint64())
	}
	before := live()
	stop, most := make(chan struct{}), make(chan int64)
	go func() {
		n := before
		for {
			select {
			case <-stop:
				most <- max(n, live())
				return
			case <-time.After(200 * time.Microsecond):
				n = max(n, live())
			}
		}
	}()
	f()
	close(stop)
	return <-most - before
}
