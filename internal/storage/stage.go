package storage

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	sarchive "github.com/containers/storage/pkg/archive"
	"github.com/containers/storage/pkg/ioutils"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/readahead"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/archive/tar"
	tsstorage "github.com/vbatts/tar-split/tar/storage"

	"github.com/precache/precache-agent/internal/archive"
)

// A staged layer is a folder of its own in the staging folder.
const (
	treeName  = "dir"          // the layer's files
	splitName = "tar-split.gz" // what makes the same tar of them again
	markName  = "layer.json"   // written last: a folder that has it is complete
)

// A staged layer, as its mark says.
type staged struct {
	DiffID      digest.Digest        `json:"diffID"`
	Size        int64                `json:"size"`           // of the plain tar, in bytes
	Blob        digest.Digest        `json:"blob,omitempty"` // it was read from; empty: copied inside the store
	Compression sarchive.Compression `json:"compression"`    // of that blob
	UIDs        []uint32             `json:"uids"`
	GIDs        []uint32             `json:"gids"`
	Boot        string               `json:"boot"` // in which boot: not durable in another one

	path string
}

// findStaged takes over what an earlier run staged, and removes what it did not finish.
func (s *Store) findStaged() error {
	entries, err := os.ReadDir(s.staging)
	if err != nil {
		return fmt.Errorf("read staging folder: %w", err)
	}
	for _, e := range entries {
		l := &staged{path: filepath.Join(s.staging, e.Name())}
		b, err := os.ReadFile(filepath.Join(l.path, markName))
		if err == nil && json.Unmarshal(b, l) == nil && l.Boot == s.boot && l.DiffID.Validate() == nil && s.parallel() {
			s.staged[l.DiffID] = append(s.staged[l.DiffID], l)
			continue
		}
		if err := os.RemoveAll(l.path); err != nil {
			return fmt.Errorf("remove unfinished layer: %w", err)
		}
	}
	return nil
}

// Stage extracts a layer beside the store, and returns how many bytes its
// plain tar has. Nil means that the layer is there, whole, and is what diffID
// says. The store's lock is not held. It is idempotent, but one layer must not
// be staged twice at the same time.
func (s *Store) Stage(ctx context.Context, diffID digest.Digest, b *archive.Blob) (int64, error) {
	if l := s.pick(diffID, nil); l != nil {
		return l.Size, nil
	}
	var l *staged
	err := b.Unpack(ctx, func(plain io.Reader, c archive.Compression) (err error) {
		l, err = s.extract(diffID, plain)
		if l != nil {
			l.Blob, l.Compression = b.Digest, compressions[c]
			if b.Digest == diffID { // of a docker-archive, whatever was around it
				l.Compression = sarchive.Uncompressed
			}
		}
		return err
	})
	if err != nil {
		if l != nil {
			os.RemoveAll(l.path)
		}
		return 0, fmt.Errorf("extract layer %s: %w", diffID, err)
	}
	return l.Size, s.mark(l)
}

var compressions = map[archive.Compression]sarchive.Compression{
	archive.None: sarchive.Uncompressed, archive.Gzip: sarchive.Gzip, archive.Zstd: sarchive.Zstd, archive.Xz: sarchive.Xz,
}

// mark says that a staged layer is complete.
func (s *Store) mark(l *staged) error {
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("encode mark: %w", err)
	}
	if err := ioutils.AtomicWriteFileWithOpts(filepath.Join(l.path, markName), b, 0o600, &ioutils.AtomicFileWriterOptions{NoSync: true}); err != nil {
		os.RemoveAll(l.path)
		return fmt.Errorf("mark layer %s: %w", l.DiffID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.staged[l.DiffID] = append(s.staged[l.DiffID], l)
	return nil
}

// pick returns a staged layer that is not in used.
func (s *Store) pick(diffID digest.Digest, used map[*staged]bool) *staged {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.staged[diffID] {
		if !used[l] {
			return l
		}
	}
	return nil
}

// forget drops a staged layer from memory: it was renamed into the store.
func (s *Store) forget(l *staged) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.staged[l.DiffID] = slices.DeleteFunc(s.staged[l.DiffID], func(o *staged) bool { return o == l })
	if len(s.staged[l.DiffID]) == 0 {
		delete(s.staged, l.DiffID)
	}
}

// Unstage removes what is staged.
func (s *Store) Unstage() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.staged)
	entries, err := os.ReadDir(s.staging)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read staging folder: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(s.staging, e.Name())))
	}
	return errors.Join(errs...)
}

// What has been extracted and not taken down yet, at most.
const (
	aheadBuffers = 4
	aheadBuffer  = 128 << 10
)

var pipeBuffers = sync.Pool{New: func() any { return new([aheadBuffer]byte) }}

// extract makes a staged layer of a plain tar, all but its mark. On error
// nothing is left, and the layer is nil.
func (s *Store) extract(diffID digest.Digest, plain io.Reader) (_ *staged, err error) {
	dir, err := os.MkdirTemp(s.staging, diffID.Encoded()+".")
	if err != nil {
		return nil, fmt.Errorf("make staging folder: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	tree := filepath.Join(dir, treeName)
	if err := os.Mkdir(tree, 0o700); err != nil {
		return nil, fmt.Errorf("make staging folder: %w", err)
	}
	root, err := os.Open(tree)
	if err != nil {
		return nil, fmt.Errorf("open staging folder: %w", err)
	}
	defer root.Close()

	// The extractor pulls the tar in a thread that is locked in the layer's
	// folder; what it has read goes on to where it is hashed and taken down.
	l := &staged{DiffID: diffID, Boot: s.boot, path: dir}
	pr, pw := io.Pipe()
	split := make(chan error, 1)
	ahead, err := readahead.NewReaderSize(pr, aheadBuffers, aheadBuffer) // so that the extractor need not wait
	if err != nil {
		return nil, err
	}
	go func() {
		err := l.disassemble(ahead, filepath.Join(dir, splitName))
		pr.CloseWithError(err) // nil: io.ErrClosedPipe, but nothing is written any more
		ahead.Close()
		split <- err
	}()
	buf := pipeBuffers.Get().(*[aheadBuffer]byte)
	defer pipeBuffers.Put(buf)
	input := &watched{r: plain}
	t := &tee{r: input, w: pw, buf: buf[:0]}
	err = inRoot(root, func() error {
		if err := sarchive.Unpack(t, "/", s.tar); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, t) // what follows the end of the tar belongs to the digest
		return err
	})
	if err == nil {
		err = t.flush()
	}
	pw.CloseWithError(err) // nil: io.EOF
	if splitErr := <-split; err == nil || t.failed {
		err = splitErr
	}
	switch {
	case err == nil:
		return l, nil
	case input.err != nil && input.err != io.EOF:
		return nil, input.err // whatever the extractor made of it
	case errors.Is(err, tsstorage.ErrDuplicatePath): // the store could not give the layer back
		return nil, &archive.Error{Reason: archive.Unsupported, Err: err}
	case archive.ReasonOf(err) == "" && !errors.As(err, new(syscall.Errno)):
		return nil, &archive.Error{Reason: archive.CorruptArchive, Err: err} // not the disk's fault, so the layer's
	}
	return nil, err
}

// A tee reads from r, and writes what was read to w in large pieces.
type tee struct {
	r      io.Reader
	w      io.Writer
	buf    []byte
	failed bool // w did
}

func (t *tee) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	for b := p[:n]; len(b) > 0; {
		free := t.buf[len(t.buf):cap(t.buf)]
		c := copy(free, b)
		t.buf, b = t.buf[:len(t.buf)+c], b[c:]
		if len(t.buf) == cap(t.buf) {
			if err := t.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, err
}

func (t *tee) flush() error {
	_, err := t.w.Write(t.buf)
	t.buf = t.buf[:0]
	t.failed = err != nil
	return err
}

// disassemble takes down what of a tar its files do not say, in tar-split's
// form, and finds its digest, its size and its owners.
func (l *staged) disassemble(r io.Reader, path string) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("create tar-split: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("write tar-split: %w", cerr)
		}
	}()
	digester := digest.SHA256.Digester()
	counter := &count{}
	br := bufio.NewReaderSize(io.TeeReader(r, io.MultiWriter(digester.Hash(), counter)), 64<<10)
	w := bufio.NewWriterSize(f, 64<<10)
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return fmt.Errorf("compress tar-split: %w", err)
	}
	if err := l.pack(br, tsstorage.NewJSONPacker(z)); err != nil {
		return err
	}
	if err := errors.Join(z.Close(), w.Flush()); err != nil {
		return fmt.Errorf("write tar-split: %w", err)
	}
	l.Size = counter.n
	if got := digester.Digest(); got != l.DiffID {
		return &archive.Error{Reason: archive.DigestMismatch, Err: fmt.Errorf("content has diffID %s, the config says %s", got, l.DiffID)}
	}
	return nil
}

type count struct{ n int64 }

func (c *count) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

func (l *staged) pack(r io.Reader, p tsstorage.Packer) error {
	uids, gids := map[uint32]bool{}, map[uint32]bool{}
	put := tsstorage.NewDiscardFilePutter()
	tr := tar.NewReader(r)
	tr.RawAccounting = true
	segment := func(b []byte) error {
		if len(b) == 0 {
			return nil
		}
		_, err := p.AddEntry(tsstorage.Entry{Type: tsstorage.SegmentType, Payload: b})
		return err
	}
	for {
		h, err := tr.Next()
		if err != nil && err != io.EOF {
			return err
		}
		if err := segment(tr.RawBytes()); err != nil {
			return fmt.Errorf("write tar-split: %w", err)
		}
		if err == io.EOF {
			break
		}
		if !strings.HasPrefix(path.Base(h.Name), sarchive.WhiteoutPrefix) {
			uids[uint32(h.Uid)], gids[uint32(h.Gid)] = true, true
		}
		e := tsstorage.Entry{Type: tsstorage.FileType, Size: h.Size}
		e.SetName(h.Name)
		if h.Size > 0 {
			if _, e.Payload, err = put.Put(h.Name, tr); err != nil {
				return err
			}
		}
		if _, err := p.AddEntry(e); err != nil {
			return fmt.Errorf("write tar-split: %w", err)
		}
		if err := segment(tr.RawBytes()); err != nil {
			return fmt.Errorf("write tar-split: %w", err)
		}
	}
	for tail := make([]byte, 64<<10); ; {
		n, err := r.Read(tail)
		if err := segment(tail[:n]); err != nil {
			return fmt.Errorf("write tar-split: %w", err)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	l.UIDs, l.GIDs = slices.Sorted(maps.Keys(uids)), slices.Sorted(maps.Keys(gids))
	return nil
}
