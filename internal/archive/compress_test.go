package archive

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/fixture"
)

func readerOf(b []byte) io.Reader { return bytes.NewReader(b) }

const mib = 1 << 20

// zstdFrame is a frame that claims to need a window of 1<<log bytes (RFC 8878, section 3.1.1), and does not compress.
func zstdFrame(log int, data []byte) []byte {
	b := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, byte(log-10) << 3}
	for first := true; first || len(data) > 0; first = false {
		n := min(len(data), 100<<10)
		block := uint32(n) << 3 // raw
		if n == len(data) {
			block |= 1 // the last one
		}
		b = append(b, byte(block), byte(block>>8), byte(block>>16))
		b = append(b, data[:n]...)
		data = data[n:]
	}
	return b
}

// zstdSegment is a frame of a single segment that claims to hold size bytes.
func zstdSegment(size uint64, data []byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte{0x28, 0xb5, 0x2f, 0xfd, 3<<6 | 1<<5}, size)
	return append(b, zstdFrame(20, data)[6:]...)
}

// zstdSkip is a skippable frame.
func zstdSkip(n int) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte{0x5a, 0x2a, 0x4d, 0x18}, uint32(n)), make([]byte, n)...)
}

// xzDict is a stream that claims to need a dictionary of so many bits (The .xz File Format, section 5.3.1): 22 is 8 MiB, 28 is 64 MiB.
func xzDict(t testing.TB, bits byte, data []byte) []byte {
	t.Helper()
	b := pack(t, fixture.XZ, 0, data)
	head := b[12 : 12+4*(1+int(b[12]))]
	if head[1] != 0 || head[2] != 0x21 || head[3] != 1 {
		t.Fatalf("block header % x", head)
	}
	head[4] = bits
	end := len(head) - 4
	binary.LittleEndian.PutUint32(head[end:], crc32.ChecksumIEEE(head[:end]))
	return b
}

func TestDecompress(t *testing.T) {
	data := []byte("some content that is long enough to be cut in the middle")
	half := len(data) / 2
	gz, xzs, zst := pack(t, fixture.Gzip, 0, data), pack(t, fixture.XZ, 0, data), pack(t, fixture.Zstd, 0, data)
	two := func(c fixture.Compression) []byte {
		return append(pack(t, c, 0, data[:half]), pack(t, c, 0, data[half:])...)
	}
	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	for _, tt := range []struct {
		name  string
		in    []byte
		c     Compression
		error Reason // "": none
	}{
		{"plain", data, None, ""},
		{"gzip", gz, Gzip, ""},
		{"zstd", zst, Zstd, ""},
		{"xz", xzs, Xz, ""},
		{"two gzip members", two(fixture.Gzip), Gzip, ""},
		{"two zstd frames", two(fixture.Zstd), Zstd, ""},
		{"two xz streams", two(fixture.XZ), Xz, ""},
		{"empty gzip members", join(pack(t, fixture.Gzip, 0, nil), gz, pack(t, fixture.Gzip, 0, nil)), Gzip, ""},
		{"xz padding", join(pack(t, fixture.XZ, 0, data[:half]), make([]byte, 8), pack(t, fixture.XZ, 0, data[half:]), make([]byte, 4)), Xz, ""},
		{"odd xz padding", join(xzs, make([]byte, 3)), Xz, CorruptArchive},
		{"gzip and noise", join(gz, []byte("noise, noise")), Gzip, CorruptArchive},
		{"zstd and noise", join(zst, []byte("noise, noise")), Zstd, CorruptArchive},
		{"xz and noise", join(xzs, []byte("noise, noise")), Xz, CorruptArchive},
		{"half a gzip", gz[:len(gz)-10], Gzip, CorruptArchive},
		{"half a zstd", zst[:len(zst)-10], Zstd, CorruptArchive},
		{"half a xz", xzs[:len(xzs)-10], Xz, CorruptArchive},
		{"gzip with a wrong checksum", join(gz[:len(gz)-8], []byte{1, 2, 3, 4}, gz[len(gz)-4:]), Gzip, CorruptArchive},
		{"zstd with a wrong checksum", join(zst[:len(zst)-4], []byte{1, 2, 3, 4}), Zstd, CorruptArchive},
		{"zstd, 8 MiB", zstdFrame(23, data), Zstd, ""},
		{"zstd, 16 MiB", zstdFrame(24, data), Zstd, ""},
		{"zstd, 64 MiB", zstdFrame(26, data), Zstd, ""},
		{"zstd, 128 MiB", zstdFrame(27, data), Zstd, Unsupported},
		{"zstd, 2 GiB", zstdFrame(31, data), Zstd, Unsupported},
		{"zstd, 2 TiB", zstdFrame(41, data), Zstd, Unsupported},
		{"zstd, growing windows", join(zstdFrame(23, data[:half]), zstdFrame(24, data[half:])), Zstd, Unsupported},
		{"zstd, windows that grow beyond", join(zstdFrame(26, data[:half]), zstdFrame(27, data[half:])), Zstd, Unsupported},
		{"zstd, windows that grow a little", join(zstdFrame(10, data[:half]), zstdFrame(23, data[half:])), Zstd, ""},
		{"zstd, shrinking windows", join(zstdFrame(26, data[:half]), zstdFrame(10, data[half:])), Zstd, ""},
		{"zstd, one segment", zstdSegment(uint64(len(data)), data), Zstd, ""},
		{"zstd, one segment of 1 TiB", zstdSegment(1<<40, data), Zstd, Unsupported},
		{"zstd, one segment of 16 EiB", zstdSegment(1<<64-1, data), Zstd, Unsupported},
		{"zstd, one segment that is shorter", zstdSegment(uint64(len(data)+1), data), Zstd, CorruptArchive},
		{"zstd, one segment that is longer", zstdSegment(uint64(len(data)-1), data), Zstd, CorruptArchive},
		{"zstd, skipped first", join(zstdSkip(100), zst), Zstd, ""},
		{"zstd, skipped in the middle", join(zstdFrame(20, data[:half]), zstdSkip(0), zstdSkip(70000), zstdFrame(20, data[half:])), Zstd, ""},
		{"zstd, skipped at the end", join(zst, zstdSkip(10)), Zstd, ""},
		{"zstd, skipped and short", zstdSkip(100)[:50], Zstd, CorruptArchive},
		{"zstd, skipped, 128 MiB", join(zstdSkip(3), zstdFrame(27, data)), Zstd, Unsupported},
		{"zstd, reserved bit", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 8}, zstdFrame(20, data)[5:]...), Zstd, CorruptArchive},
		{"zstd, with a dictionary", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 80, 7}, zstdFrame(20, data)[6:]...), Zstd, CorruptArchive},
		{"xz, 4 KiB", xzDict(t, 0, data), Xz, ""},
		{"xz, 8 MiB", xzDict(t, 22, data), Xz, ""},
		{"xz, 12 MiB", xzDict(t, 23, data), Xz, ""},
		{"xz, 64 MiB", xzDict(t, 28, data), Xz, ""},
		{"xz, 96 MiB", xzDict(t, 29, data), Xz, Unsupported},
		{"xz, 4 GiB", xzDict(t, 40, data), Xz, Unsupported},
		{"xz, more than that", xzDict(t, 41, data), Xz, CorruptArchive},
		{"xz, growing dictionaries", join(xzDict(t, 22, data[:half]), xzDict(t, 24, data[half:])), Xz, Unsupported},
		{"xz, dictionaries that grow beyond", join(xzDict(t, 28, data[:half]), xzDict(t, 30, data[half:])), Xz, Unsupported},
		{"xz, dictionaries that grow a little", join(xzDict(t, 0, data[:half]), xzDict(t, 22, data[half:])), Xz, ""},
		{"xz, shrinking dictionaries", join(xzDict(t, 28, data[:half]), xzDict(t, 0, data[half:])), Xz, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			room := &Room{}
			var got []byte
			var c Compression
			var err error
			n := peak(func() {
				var z io.ReadCloser
				if z, c, err = decompress(t.Context(), readerOf(tt.in), &tenant{room: room}); err == nil {
					got, err = io.ReadAll(z)
					z.Close()
				}
			})
			if err = classify(CorruptArchive, noEOF(err)); tt.error != "" {
				wantReason(t, err, tt.error)
			} else if err != nil || !bytes.Equal(got, data) || c != tt.c {
				t.Errorf("%q, %s, %v", got, c, err)
			}
			wantRoom(t, room)
			if n > 100*mib {
				t.Errorf("it took %d MiB", n>>20)
			}
		})
	}
	for n := range 6 { // shorter than what is looked at
		z, c, err := decompress(t.Context(), readerOf(data[:n]), &tenant{})
		must(t, err)
		if got, err := io.ReadAll(z); err != nil || c != None || !bytes.Equal(got, data[:n]) {
			t.Errorf("%d bytes: %q, %s, %v", n, got, c, err)
		}
	}
}

// windowed stages an image in an outer compression, with a layer of an inner one.
func windowed(t *testing.T, outer func([]byte) []byte, inner func([]byte) []byte) (*Archive, string, *fixture.Image) {
	t.Helper()
	tarred, err := fixture.Tar(fixture.Entry{Name: "noise", Data: string(noise(1, 100<<10))})
	must(t, err)
	l := newLayer(t, fixture.LayerSpec{Compression: fixture.None, Tar: readerOf(inner(tarred))})
	l.DiffID = digest.FromBytes(tarred)
	img := imageOf(t, l, text(t, "x"))
	path, err := fixture.Stage{Compression: fixture.None}.Write(t.TempDir(), img.Ref(repo), img)
	must(t, err)
	b, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, outer(b), 0o644))
	a, _ := find(t, filepath.Dir(path), img.Ref(repo))
	return a, img.Ref(repo), img
}

// What an archive needs for its outer compression and for the layer at hand is at most 64 MiB in all,
// and an archive never waits for itself.
func TestWindowsInWindows(t *testing.T) {
	zstd := func(log int) func([]byte) []byte { return func(b []byte) []byte { return zstdFrame(log, b) } }
	xz := func(bits byte) func([]byte) []byte { return func(b []byte) []byte { return xzDict(t, bits, b) } }
	same := func(b []byte) []byte { return b }
	for _, tt := range []struct {
		name         string
		outer, inner func([]byte) []byte
		error        Reason
	}{
		{"small in none", same, zstd(23), ""},
		{"large in none", same, zstd(26), ""},
		{"larger in none", same, zstd(27), Unsupported},
		{"small in large", xz(28), zstd(23), ""},
		{"half in half", xz(26), zstd(25), ""},
		{"half in half, the other way", zstd(25), xz(26), ""},
		{"16 MiB in 64 MiB", xz(28), zstd(24), Unsupported},
		{"64 MiB in 32 MiB", xz(26), zstd(26), Unsupported},
		{"large in large", zstd(26), zstd(26), Unsupported},
		{"none in larger", zstd(27), same, Unsupported},
		{"none in larger xz", xz(30), same, Unsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, ref, img := windowed(t, tt.outer, tt.inner)
			within(t, 30*time.Second, func() {
				v := &taker{}
				got, err := a.Visit(t.Context(), set(t, ref), v)
				if tt.error != "" {
					wantReason(t, err, tt.error)
				} else if err != nil {
					t.Error(err)
				} else {
					wantImage(t, got, img)
					v.wantContent(t, got)
				}
			})
			wantRoom(t, a.part.Room)
		})
	}
}

// wantRoom fails unless all of the room is free again.
func wantRoom(t testing.TB, room *Room) {
	t.Helper()
	if n, m := len(room.medium), len(room.large); n+m != 0 {
		t.Errorf("%d and %d places are not given back", n, m)
	}
}

// Whatever archives need at once, in whatever order they come: nobody waits for ever.
func TestRoomMixed(t *testing.T) {
	zstd := func(log int) func([]byte) []byte { return func(b []byte) []byte { return zstdFrame(log, b) } }
	same := func(b []byte) []byte { return b }
	room := &Room{}
	var wg sync.WaitGroup
	for i, kinds := range slices.Repeat([][2]func([]byte) []byte{
		{zstd(20), zstd(26)}, {same, zstd(26)}, {zstd(26), zstd(20)}, {zstd(23), same}, {zstd(24), zstd(25)}, {zstd(20), zstd(23)},
	}, 3) {
		a, ref, _ := windowed(t, kinds[0], kinds[1])
		a.part.Room = room
		wg.Go(func() {
			v := &taker{unpack: func(b *Blob) (content []byte, err error) {
				err = b.Unpack(t.Context(), func(r io.Reader, _ Compression) error {
					time.Sleep(time.Duration(i) * time.Millisecond)
					content, err = io.ReadAll(r)
					return err
				})
				return content, err
			}}
			img, err := a.Visit(t.Context(), set(t, ref), v)
			if err != nil {
				t.Error(err)
				return
			}
			v.wantContent(t, img)
		})
	}
	within(t, 60*time.Second, wg.Wait)
	wantRoom(t, room)
}

// One archive at a time has the room; the others wait, and all get it in the end.
func TestRoomShared(t *testing.T) {
	room := &Room{}
	var inside, most atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		outer := func(b []byte) []byte { return zstdFrame(26, b) }
		inner := func(b []byte) []byte { return b }
		if i%2 == 1 {
			outer, inner = inner, outer
		}
		a, ref, _ := windowed(t, outer, inner)
		a.part.Room = room
		wg.Go(func() {
			v := &taker{unpack: func(b *Blob) (content []byte, err error) {
				err = b.Unpack(t.Context(), func(r io.Reader, c Compression) error {
					if i%2 == 0 || c == Zstd { // it has the room now
						most.Store(max(most.Load(), inside.Add(1)))
						defer inside.Add(-1)
						time.Sleep(5 * time.Millisecond)
					}
					content, err = io.ReadAll(r)
					return err
				})
				return content, err
			}}
			img, err := a.Visit(t.Context(), set(t, ref), v)
			if err != nil {
				t.Error(err)
				return
			}
			v.wantContent(t, img)
		})
	}
	within(t, 60*time.Second, wg.Wait)
	if most.Load() != 1 {
		t.Errorf("%d had the room at once", most.Load())
	}
	wantRoom(t, room)
}

// Who waits for room stops waiting when its context ends.
func TestRoomCancelled(t *testing.T) {
	room := &Room{}
	release, err := (&tenant{room: room}).take(t.Context(), largeWindow)
	must(t, err)
	a, ref, _ := windowed(t, func(b []byte) []byte { return zstdFrame(26, b) }, func(b []byte) []byte { return b })
	a.part.Room = room
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	within(t, 10*time.Second, func() {
		if _, err := a.Visit(ctx, set(t, ref), &taker{}); !errors.Is(err, context.DeadlineExceeded) || ReasonOf(err) != "" {
			t.Errorf("%v (%q)", err, ReasonOf(err))
		}
	})
	release()
	_, err = take(t, a, set(t, ref))
	must(t, err)
}

// Without a room windows are not waited for, but bounded all the same.
func TestNoRoom(t *testing.T) {
	one, two := &tenant{}, &tenant{}
	for _, te := range []*tenant{one, two} {
		_, err := te.take(t.Context(), largeWindow)
		must(t, err)
		_, err = te.take(t.Context(), mediumWindow+1)
		wantReason(t, err, Unsupported)
		_, err = te.take(t.Context(), mediumWindow)
		must(t, err)
	}
}

func TestCompressionNames(t *testing.T) {
	if got := fmt.Sprint(None, Gzip, Zstd, Xz); got != "none gzip zstd xz" {
		t.Error(got)
	}
}
