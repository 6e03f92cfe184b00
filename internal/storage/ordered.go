package storage

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containers/storage"

	"github.com/precache/precache-agent/internal/archive"
)

// Placed returns how many of an image's layers are in the store at their place, from the base up.
func (s *Store) Placed(_ context.Context, layers []archive.Layer) (int, error) {
	for i, id := range chain(layers) {
		if !s.has(id) {
			return i, nil
		}
	}
	return len(layers), nil
}

// PutLayer puts the layer layers[n], whose parents are in the store, into it,
// for a driver that cannot stage, and returns how many bytes its plain tar
// has. Nil means that the layer is there and is what its diffID says; it was
// verified before the library took it for whole. The store is locked meanwhile.
func (s *Store) PutLayer(ctx context.Context, layers []archive.Layer, n int, b *archive.Blob) (size int64, err error) {
	ids := chain(layers[:n+1])
	id, parent := ids[n], ""
	if n > 0 {
		parent = ids[n-1]
	}
	l := layers[n]
	err = b.Unpack(ctx, func(plain io.Reader, _ archive.Compression) error {
		counter := &count{}
		input := &watched{r: archive.NewVerifier(plain, l.DiffID)}
		options := &storage.LayerOptions{OriginalDigest: l.Digest, OriginalSize: &l.Size, UncompressedDigest: l.DiffID}
		s.lib.Lock()
		_, _, err := s.store.PutLayer(id, parent, nil, "", false, options, io.TeeReader(input, counter))
		s.lib.Unlock()
		size = counter.n
		switch {
		case input.err != nil && input.err != io.EOF:
			return input.err // whatever the library made of it
		case errors.Is(err, storage.ErrDuplicateID): // somebody else has put it meanwhile
			return nil
		case err != nil:
			return &archive.Error{Reason: archive.StoreFailed, Err: fmt.Errorf("put layer: %w", err)}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("layer %s: %w", l.DiffID, err)
	}
	return size, nil
}

// A watched reader remembers how reading from it ended.
type watched struct {
	r   io.Reader
	err error
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	w.err = err
	return n, err
}
