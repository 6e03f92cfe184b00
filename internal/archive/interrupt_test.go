package archive

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/precache/precache-agent/internal/fixture"
)

func mkfifo(path string) error { return syscall.Mkfifo(path, 0o644) }

// wantGoroutines fails unless the number of goroutines goes down again to what it was before.
func wantGoroutines(t *testing.T, before int) {
	t.Helper()
	for range 200 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	buf := make([]byte, 1<<20)
	t.Errorf("%d goroutines, there were %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
}

// However far it has come, a visit ends when its context does, with the context's error and no goroutine left.
func TestCancelled(t *testing.T) {
	img := imageOf(t, newLayer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "a", Data: string(noise(1, 2<<20))}}}), big(t, 2, maxHeld+1))
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip, fixture.Zstd} {
		for _, order := range orders[:3] {
			a, of := stage(t, fixture.Stage{Compression: c, Edits: order.edits}, repo, img)
			for name, f := range map[string]func(context.Context, context.CancelFunc) error{
				"before": func(ctx context.Context, cancel context.CancelFunc) error {
					cancel()
					_, err := a.Visit(ctx, of, &taker{})
					return err
				},
				"when resolved": func(ctx context.Context, cancel context.CancelFunc) error {
					_, err := a.Visit(ctx, of, &cancelling{cancel: cancel})
					return err
				},
				"in a layer": func(ctx context.Context, cancel context.CancelFunc) error {
					_, err := a.Visit(ctx, of, &taker{unpack: func(b *Blob) ([]byte, error) {
						return nil, b.Unpack(ctx, func(r io.Reader, _ Compression) error {
							if _, err := io.CopyN(io.Discard, r, 100<<10); err != nil {
								return err
							}
							cancel()
							_, err := io.Copy(io.Discard, r)
							if err == nil { // it was in memory
								err = ctx.Err()
							}
							return err
						})
					}})
					return err
				},
				"before verify": func(ctx context.Context, cancel context.CancelFunc) error {
					cancel()
					return errors.Join(a.Verify(ctx, of)...)
				},
			} {
				before := runtime.NumGoroutine()
				ctx, cancel := context.WithCancel(t.Context())
				err := f(ctx, cancel)
				if !errors.Is(err, context.Canceled) || ReasonOf(err) != "" {
					t.Errorf("%s, %s, outer %d: %v (%q)", name, order.name, c, err, ReasonOf(err))
				}
				cancel()
				wantGoroutines(t, before)
			}
		}
	}
}

// cancelling ends the context as soon as the image is known.
type cancelling struct {
	taker
	cancel context.CancelFunc
}

func (v *cancelling) Resolved(img *Image) error {
	v.cancel()
	return v.taker.Resolved(img)
}

func TestDeadline(t *testing.T) {
	img := imageOf(t, big(t, 1, 5<<20))
	a, of := stage(t, fixture.Stage{}, repo, img)
	ctx, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	if _, err := a.Visit(ctx, of, &taker{}); !errors.Is(err, context.DeadlineExceeded) || ReasonOf(err) != "" {
		t.Errorf("%v (%q)", err, ReasonOf(err))
	}
	if errs := a.Verify(ctx, of); len(errs) != 1 || !errors.Is(errs[0], context.DeadlineExceeded) {
		t.Errorf("verify: %v", errs)
	}
}

// A visitor that gives up in the middle of a layer leaves no goroutine behind.
func TestVisitorGivesUp(t *testing.T) {
	img := imageOf(t, newLayer(t, fixture.LayerSpec{Entries: []fixture.Entry{{Name: "a", Data: string(noise(1, aheadFrom+1))}}}))
	full := fault(NoSpace, "full")
	before := runtime.NumGoroutine()
	for _, c := range []fixture.Compression{fixture.None, fixture.Gzip, fixture.Zstd} {
		a, of := stage(t, fixture.Stage{Compression: c}, repo, img)
		_, err := a.Visit(t.Context(), of, &taker{unpack: func(b *Blob) ([]byte, error) {
			return nil, b.Unpack(t.Context(), func(r io.Reader, _ Compression) error {
				_, err := io.CopyN(io.Discard, r, 1000)
				return errors.Join(err, full)
			})
		}})
		wantReason(t, err, NoSpace)
	}
	wantGoroutines(t, before)
}

// The partition's faults are read-failed, which may pass, and never corrupt-archive.
func TestReadFails(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "folder"), 0o755))
	for _, tt := range []struct {
		name, root, file string
		errno            syscall.Errno
	}{
		{"a folder in its place", dir, "folder", syscall.EISDIR},
		{"an unreadable file", "/proc/self", "mem", syscall.EIO},
		{"gone", dir, "gone", syscall.ENOENT},
	} {
		a := &Archive{Name: tt.file, part: partition(t, tt.root)}
		of := set(t, repo)
		_, err := a.Visit(t.Context(), of, &taker{})
		wantReason(t, err, ReadFailed)
		if !errors.Is(err, tt.errno) {
			t.Errorf("%s: %v", tt.name, err)
		}
		errs := a.Verify(t.Context(), of)
		if len(errs) != 1 || ReasonOf(errs[0]) != ReadFailed {
			t.Errorf("%s: verify: %v", tt.name, errs)
		}
	}
	gone := &Archive{Name: "gone", folder: true, part: partition(t, dir)}
	_, err := gone.Visit(t.Context(), set(t, repo), &taker{})
	wantReason(t, err, ReadFailed)
}

// A real EIO in the middle of a file: its first page can be read, the one behind cannot. The file is this process's own
// memory, into which a file of two pages is mapped that is then cut to one (proc(5), mmap(2)).
func TestReadFailsInTheMiddle(t *testing.T) {
	page := os.Getpagesize()
	for _, c := range compressions {
		content := pack(t, c, 0, tarOf("a", string(noise(1, 3*page))))[:page]
		f, err := os.Create(filepath.Join(t.TempDir(), "mapped"))
		must(t, err)
		defer f.Close()
		_, err = f.Write(append(content, make([]byte, page)...))
		must(t, err)
		m, err := syscall.Mmap(int(f.Fd()), 0, 2*page, syscall.PROT_READ, syscall.MAP_SHARED)
		must(t, err)
		defer syscall.Munmap(m)
		must(t, f.Truncate(int64(page)))

		mem, err := os.Open("/proc/self/mem")
		must(t, err)
		defer mem.Close()
		at := int64(uintptr(unsafe.Pointer(&m[0])))
		_, err = mem.Seek(at, io.SeekStart)
		must(t, err)
		a := &Archive{Name: "x", part: partition(t, t.TempDir())}
		r := &file{ctx: t.Context(), f: mem, a: a}
		got := make([]byte, page)
		_, err = io.ReadFull(r, got)
		must(t, err)
		if !bytes.Equal(got, content) {
			t.Fatal("the first page is another")
		}
		_, err = mem.Seek(at, io.SeekStart)
		must(t, err)
		z, _, err := decompress(t.Context(), r, &tenant{})
		if err == nil {
			_, err = io.Copy(io.Discard, z)
			z.Close()
		}
		wantReason(t, classify(CorruptArchive, noEOF(err)), ReadFailed)
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("outer %d: %v", c, err)
		}
		if a.BytesRead() < int64(2*page) {
			t.Errorf("%d bytes were counted", a.BytesRead())
		}
	}
}

func TestErrors(t *testing.T) {
	inner := fault(Unsupported, "inner")
	for _, tt := range []struct {
		err  error
		want Reason
	}{
		{nil, ""},
		{io.EOF, CorruptArchive},
		{inner, Unsupported},
		{errors.Join(io.EOF, inner), Unsupported},
		{context.Canceled, ""},
		{context.DeadlineExceeded, ""},
	} {
		got := classify(CorruptArchive, tt.err)
		if ReasonOf(got) != tt.want || (got == nil) != (tt.err == nil) || got != nil && (got.Error() != tt.err.Error() || !errors.Is(got, tt.err)) {
			t.Errorf("%v: got %v (%q), want %q", tt.err, got, ReasonOf(got), tt.want)
		}
	}
}
