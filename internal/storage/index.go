package storage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containers/storage"
	"github.com/containers/storage/pkg/ioutils"
	"github.com/containers/storage/pkg/lockfile"
)

// An index is layers.json or images.json. The library writes the one three
// times for each layer and the other six times for each image, all of it every
// time; a batch writes it twice. Records of others are kept as they are, fields
// that this version of the library does not know included.
type index[T any] struct {
	path string
	lock *lockfile.LockFile // the library's own: it also tells its users to read the index again

	raw    []json.RawMessage
	parsed []T
	file   os.FileInfo // of which raw was read
}

func newIndex[T any](dir, name string) (*index[T], error) {
	// The same object as the library has in this process, so that it excludes both.
	lock, err := lockfile.GetLockFile(filepath.Join(dir, name+".lock"))
	if err != nil {
		return nil, fmt.Errorf("open lock of %s: %w", name, err)
	}
	return &index[T]{path: filepath.Join(dir, name+".json"), lock: lock}, nil
}

// open locks the index and reads it, unless it is still what was last read or written.
func (x *index[T]) open() error {
	x.lock.Lock()
	if err := x.read(); err != nil {
		x.lock.Unlock()
		return fmt.Errorf("read %s: %w", x.path, err)
	}
	return nil
}

func (x *index[T]) close() { x.lock.Unlock() }

func (x *index[T]) read() error {
	file, err := os.Stat(x.path)
	if err == nil && x.same(file) {
		return nil
	}
	x.raw, x.parsed, x.file = nil, nil, nil
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	b, err := os.ReadFile(x.path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &x.raw); err != nil {
		return err
	}
	x.parsed = make([]T, len(x.raw))
	for i, raw := range x.raw {
		if err := json.Unmarshal(raw, &x.parsed[i]); err != nil {
			return err
		}
	}
	x.file = file
	return nil
}

// whole returns the IDs of the layers that are complete.
func whole(x *index[storage.Layer]) map[string]bool {
	ids := make(map[string]bool, len(x.parsed))
	for _, l := range x.parsed {
		if _, incomplete := l.Flags["incomplete"]; !incomplete {
			ids[l.ID] = true
		}
	}
	return ids
}

// same reports whether file is the one that was read: whoever writes the index renames a new file into place.
func (x *index[T]) same(file os.FileInfo) bool {
	return x.file != nil && os.SameFile(file, x.file) && file.Size() == x.file.Size() && file.ModTime().Equal(x.file.ModTime())
}

// write replaces the index by what open read, and more.
func (x *index[T]) write(more []T) ([]json.RawMessage, error) {
	all := x.raw[:len(x.raw):len(x.raw)]
	for _, record := range more {
		b, err := json.Marshal(record)
		if err != nil {
			return nil, fmt.Errorf("encode record: %w", err)
		}
		all = append(all, b)
	}
	b := make([]byte, 0, len(all)*1024)
	b = append(b, '[')
	for i, raw := range all {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, bytes.TrimSpace(raw)...)
	}
	b = append(b, ']')
	if _, err := x.lock.RecordWrite(); err != nil {
		return nil, fmt.Errorf("record write to %s: %w", x.path, err)
	}
	if err := ioutils.AtomicWriteFile(x.path, b, 0o600); err != nil {
		return nil, fmt.Errorf("write %s: %w", x.path, err)
	}
	return all, nil
}

// add writes the index with more records, and keeps them as read.
func (x *index[T]) add(more []T) error {
	all, err := x.write(more)
	if err != nil {
		return err
	}
	x.raw, x.parsed = all, append(x.parsed, more...)
	x.file, err = os.Stat(x.path)
	return err
}
