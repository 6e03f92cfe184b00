package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	sarchive "github.com/containers/storage/pkg/archive"
	"github.com/containers/storage/pkg/ioutils"
	"github.com/opencontainers/go-digest"
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
	OwnRoot     bool                 `json:"ownRoot,omitempty"` // the tar says what its root is like, where otherwise the driver does
	Boot        string               `json:"boot"`              // in which boot: not durable in another one

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
		if s.parallel() && l.readMark() == nil && l.Boot == s.boot {
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

// readMark reads what a complete layer says of itself. A layer that was being
// moved into the store when the agent was killed is complete no more.
func (l *staged) readMark() error {
	b, err := os.ReadFile(filepath.Join(l.path, markName))
	if err != nil {
		return err
	}
	for _, name := range []string{treeName, splitName} {
		if _, err := os.Lstat(filepath.Join(l.path, name)); err != nil {
			return err
		}
	}
	if err := json.Unmarshal(b, l); err != nil {
		return err
	}
	return l.DiffID.Validate()
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

// Unstage removes what is staged, and what a killed run has left.
func (s *Store) Unstage() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.staged)
	var errs []error
	for _, dir := range []string{s.staging, s.tmp} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read staging folder: %w", err)
		}
		for _, e := range entries {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

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

	input := &watched{r: plain}
	l := &staged{DiffID: diffID, Boot: s.boot, path: dir}
	err = l.extractTo(root, filepath.Join(dir, splitName), input, s.tar)
	switch {
	case err == nil:
		return l, nil
	case input.err != nil && input.err != io.EOF:
		return nil, input.err // whatever the extractor made of it
	case errors.Is(err, tsstorage.ErrDuplicatePath): // the store could not give the layer back
		return nil, &archive.Error{Reason: archive.Unsupported, Err: err}
	case archive.ReasonOf(err) == "" && !isOurs(err):
		return nil, &archive.Error{Reason: archive.CorruptArchive, Err: err}
	}
	return nil, err
}

// isOurs reports whether an error of extracting is the disk's or the
// machine's. Any other is the layer's: a link to nothing, a name too long.
func isOurs(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && slices.Contains([]syscall.Errno{
		syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE,
	}, errno)
}

type count struct{ n int64 }

func (c *count) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
