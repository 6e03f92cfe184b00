package archive

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/readahead"
	"github.com/therootcompany/xz"
)

// Compression is how a stream is compressed, found by its first bytes.
type Compression int

// The compressions that can be read.
const (
	None Compression = iota
	Gzip
	Zstd
	Xz
)

func (c Compression) String() string { return [...]string{"none", "gzip", "zstd", "xz"}[c] }

const (
	mediumWindow = 8 << 20  // what a decoder has to support (RFC 8878, section 3.1.1.1.2)
	largeWindow  = 64 << 20 // beyond this it is unsupported

	inputBuffer  = 128 << 10
	aheadBuffer  = 256 << 10
	aheadBuffers = 4
)

// magics are the leading bytes: RFC 1952 section 2.3.1, RFC 8878 section 3.1.1
// (and 3.1.2, skippable frames), The .xz File Format section 2.1.1.1.
func sniff(b []byte) Compression {
	switch {
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b, 0x08}):
		return Gzip
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(b) >= 4 && b[0]&0xf0 == 0x50 && b[1] == 0x2a && b[2] == 0x4d && b[3] == 0x18:
		return Zstd
	case bytes.HasPrefix(b, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return Xz
	}
	return None
}

// Room is the memory that the windows of zstd and xz share, so that parallelism
// falls to fit: four archives at a time may have windows of up to 8 MiB, and
// one may have larger ones. The zero value is ready to use.
type Room struct {
	once          sync.Once
	medium, large chan struct{}
}

func (r *Room) init() {
	r.once.Do(func() {
		r.medium = make(chan struct{}, 4)
		r.large = make(chan struct{}, 1)
	})
}

// A tenant is one archive's claim on the room. It is used by one goroutine at a time.
type tenant struct {
	room   *Room
	used   int64           // bytes of windows
	places []chan struct{} // of the room's, in which it has a place
}

// take waits until n bytes of window may be allocated, for the archive and a
// layer inside it. Who has the large place waits for nothing more, so that
// tenants never wait for each other in a circle.
func (t *tenant) take(ctx context.Context, n int64) (release func(), err error) {
	if total := t.used + n; n > largeWindow || total > largeWindow+mediumWindow {
		return nil, fault(Unsupported, "decompression needs a window of %d MiB, at most %d MiB can be had", total>>20, largeWindow>>20)
	}
	if t.room != nil {
		t.room.init()
		place := t.room.medium
		if n > mediumWindow || t.used > mediumWindow {
			place = t.room.large
		}
		if !slices.Contains(t.places, place) && !slices.Contains(t.places, t.room.large) {
			select {
			case place <- struct{}{}:
				t.places = append(t.places, place)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	t.used += n
	return func() {
		if t.used -= n; t.used == 0 {
			for _, place := range t.places {
				<-place
			}
			t.places = nil
		}
	}, nil
}

var inputs = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, inputBuffer) }}

// decompress returns the plain content of r. Close releases what it holds, but
// does not close r.
func decompress(ctx context.Context, r io.Reader, t *tenant) (_ io.ReadCloser, c Compression, err error) {
	br := inputs.Get().(*bufio.Reader)
	br.Reset(r)
	back := func() { br.Reset(nil); inputs.Put(br) }
	defer func() {
		if err != nil {
			back()
		}
	}()
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, None, err
	}
	switch c := sniff(head); c {
	case Gzip:
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, c, fmt.Errorf("read gzip header: %w", err)
		}
		return &closer{z, back}, c, nil
	case Zstd:
		z, release, err := newZstd(ctx, br, t)
		return &closer{z, func() { release(); back() }}, c, err
	case Xz:
		z, release, err := newXz(ctx, br, t)
		return &closer{z, func() { release(); back() }}, c, err
	}
	return &closer{br, back}, None, nil
}

type closer struct {
	io.Reader
	close func()
}

func (c *closer) Close() error {
	if c.close != nil {
		c.close()
	}
	c.close, c.Reader = nil, nil
	return nil
}

func newZstd(ctx context.Context, br *bufio.Reader, t *tenant) (_ io.Reader, release func(), err error) {
	head, err := br.Peek(zstd.HeaderMaxSize)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	var h zstd.Header
	if err := h.Decode(head); err != nil {
		return nil, nil, fmt.Errorf("read zstd header: %w", err)
	}
	// Later frames may ask for more than the first: the decoder refuses
	// whatever is beyond what was taken here.
	need := h.WindowSize
	if h.SingleSegment {
		need = h.FrameContentSize
	}
	window := int64(max(mediumWindow, min(need, 1<<40)))
	free, err := t.take(ctx, window)
	if err != nil {
		return nil, nil, err
	}
	z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(uint64(window)))
	if err != nil {
		free()
		return nil, nil, fmt.Errorf("read zstd: %w", err)
	}
	return zstdReader{z}, func() { z.Close(); free() }, nil
}

type zstdReader struct{ *zstd.Decoder }

func (z zstdReader) Read(p []byte) (int, error) {
	n, err := z.Decoder.Read(p)
	if errors.Is(err, zstd.ErrWindowSizeExceeded) {
		err = fault(Unsupported, "a later zstd frame needs a larger window than the first: %w", err)
	}
	return n, err
}

func newXz(ctx context.Context, br *bufio.Reader, t *tenant) (_ io.Reader, release func(), err error) {
	dict := int64(largeWindow)
	// Stream header (12 bytes), then the first block's: size, flags, two
	// optional sizes, then filters (The .xz File Format, sections 2.1.1, 3.1).
	if head, _ := br.Peek(12 + 32); len(head) >= 12+6 && head[12+1]&0xc3 == 0 && head[12+2] == 0x21 && head[12+3] == 1 {
		bits := head[12+4]
		if bits > 40 {
			return nil, nil, fault(CorruptArchive, "xz dictionary size property is %d", bits)
		}
		dict = int64(2|bits&1) << (bits/2 + 11)
		if bits == 40 {
			dict = 1<<32 - 1
		}
	}
	dict = max(dict, mediumWindow)
	free, err := t.take(ctx, dict)
	if err != nil {
		return nil, nil, err
	}
	z, err := xz.NewReader(br, uint32(dict))
	if err != nil {
		free()
		return nil, nil, fmt.Errorf("read xz header: %w", err)
	}
	return xzReader{z}, free, nil
}

type xzReader struct{ *xz.Reader }

func (z xzReader) Read(p []byte) (int, error) {
	n, err := z.Reader.Read(p)
	if errors.Is(err, xz.ErrMemlimit) {
		err = fault(Unsupported, "a later xz block needs a larger dictionary than the first: %w", err)
	}
	return n, err
}

// ahead reads r in a goroutine of its own, a few buffers ahead of the caller.
// Close waits for that goroutine.
func ahead(r io.Reader) (io.ReadCloser, error) {
	return readahead.NewReaderSize(r, aheadBuffers, aheadBuffer)
}
