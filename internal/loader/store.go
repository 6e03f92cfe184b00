package loader

import (
	"context"

	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/manifest"
)

// A Store is where images end up. All methods but Commit may be called by any
// number of goroutines.
type Store interface {
	// Present reports which images are in the store, under all their names
	// and with the digest that their reference pins.
	Present(ctx context.Context, images []manifest.Image) ([]bool, error)

	// Prepare makes the store ready to be written; it comes before the methods
	// below. It reports whether layers can be staged, any number at once and in
	// any order. If not, PutLayer takes them, one at a time, parents first.
	Prepare(ctx context.Context) (parallel bool, err error)

	// Missing returns the diffIDs of an image's layers that have to be
	// staged before the image can be committed.
	Missing(ctx context.Context, layers []archive.Layer) ([]digest.Digest, error)
	// Stage extracts a layer beside the store. Nil means that it is there,
	// whole, and what its diffID says; the number is the plain tar's bytes.
	Stage(ctx context.Context, diffID digest.Digest, b *archive.Blob) (int64, error)
	// Unstage removes what is staged and was not committed, prepared or not.
	Unstage() error

	// Placed returns how many of an image's layers are in the store at their place, from the base up.
	Placed(ctx context.Context, layers []archive.Layer) (int, error)
	// Allowed asks the policy about an image, before its first PutLayer. Commit asks as well.
	Allowed(ctx context.Context, img *archive.Image) error
	// PutLayer puts layers[n], whose parents are placed.
	PutLayer(ctx context.Context, layers []archive.Layer, n int, b *archive.Blob) (int64, error)

	// Sync returns when what was written before survives a power cut.
	Sync(ctx context.Context) error
	// Commit puts images, none of whose layers are missing, into the store.
	// Of the errors, one for each image, nil means "the image is in the
	// store, under all its names", not "this call put it there". An error
	// that has Needed() []digest.Digest names layers that are missing after all.
	Commit(ctx context.Context, images []*archive.Image) []error
}
