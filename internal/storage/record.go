package storage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containers/image/v5/directory"
	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/image"
	"github.com/containers/image/v5/pkg/blobinfocache/memory"
	"github.com/containers/image/v5/signature"
	is "github.com/containers/image/v5/storage"
	"github.com/containers/image/v5/types"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"

	"github.com/precache/precache-agent/internal/archive"
)

func gunzip(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }

// A record is an image about to be recorded: its metadata in a folder of the
// dir: layout, as the library reads it.
type record struct {
	dir      string
	src      types.ImageSource
	top      *image.UnparsedImage
	instance *digest.Digest // of a list
}

// prepare asks the policy.
func (s *Store) prepare(ctx context.Context, a *archive.Image) (_ *record, err error) {
	r := &record{}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.dir, err = os.MkdirTemp(s.tmp, "image."); err != nil {
		return nil, fmt.Errorf("make temporary folder: %w", err)
	}
	files := map[string][]byte{"manifest.json": a.Manifest}
	if a.IsList() {
		d := a.InstanceDigest()
		r.instance = &d
		files[d.Encoded()+".manifest.json"] = a.Instance
	}
	for _, sig := range a.Signatures {
		name := fmt.Sprintf("signature-%d", sig.Number)
		if sig.Instance != "" {
			name = sig.Instance.Encoded() + "." + name
		}
		files[name] = sig.Data
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(r.dir, name), b, 0o600); err != nil {
			return nil, fmt.Errorf("write metadata: %w", err)
		}
	}
	ref, err := directory.NewReference(r.dir)
	if err != nil {
		return nil, fmt.Errorf("open metadata: %w", err)
	}
	if r.src, err = ref.NewImageSource(ctx, s.sys); err != nil {
		return nil, fmt.Errorf("open metadata: %w", err)
	}
	r.top = image.UnparsedInstance(r.src, nil)
	return r, s.allowed(ctx, r, a.Path)
}

func (r *record) close() {
	if r == nil {
		return
	}
	if r.src != nil {
		r.src.Close()
	}
	if r.dir != "" {
		os.RemoveAll(r.dir)
	}
}

// allowed asks policy.json about the image as skopeo would for `dir:` at path:
// of a list, about the instance that is loaded. The library would take the
// scope from where the metadata is; so it gets the requirements of path alone.
func (s *Store) allowed(ctx context.Context, r *record, path string) error {
	pc, err := signature.NewPolicyContext(&signature.Policy{Default: s.requirements(path)})
	if err != nil {
		return fmt.Errorf("ask policy: %w", err)
	}
	defer pc.Destroy()
	if ok, err := pc.IsRunningImageAllowed(ctx, image.UnparsedInstance(r.src, r.instance)); !ok {
		return &archive.Error{Reason: archive.Policy, Err: fmt.Errorf("refused by policy: %w", err)}
	}
	return nil
}

// requirements are those of the most specific scope that matches: the path,
// the folders above it, the transport, the default (containers-policy.json(5)).
func (s *Store) requirements(path string) signature.PolicyRequirements {
	scopes := s.policy.Transports[directory.Transport.Name()]
	for scope := path; scope != "" && scope != "/" && scope != "."; scope = filepath.Dir(scope) {
		if reqs, ok := scopes[scope]; ok {
			return reqs
		}
	}
	if reqs, ok := scopes[""]; ok {
		return reqs
	}
	return s.policy.Default
}

// write records an image whose layers are in the store, through the library,
// which writes what skopeo would have written.
func (s *Store) write(ctx context.Context, r *record, a *archive.Image) (err error) {
	named, err := reference.ParseNormalizedNamed(a.Of.Ref)
	if err != nil {
		return fmt.Errorf("parse reference: %w", err)
	}
	ref, err := is.Transport.NewStoreReference(s.store, named, "")
	if err != nil {
		return fmt.Errorf("name image: %w", err)
	}
	dest, err := ref.NewImageDestination(ctx, s.sys)
	if err != nil {
		return fmt.Errorf("open record: %w", err)
	}
	defer dest.Close()
	cache := memory.New()
	config := types.BlobInfo{Digest: digest.FromBytes(a.Config), Size: int64(len(a.Config))}
	if _, err := dest.PutBlob(ctx, bytes.NewReader(a.Config), config, cache, true); err != nil {
		return fmt.Errorf("record config: %w", err)
	}
	for _, l := range a.Layers {
		// The library looks for a layer by its blob; the store may have it from another one.
		cache.RecordDigestUncompressedPair(l.Digest, l.DiffID)
		ok, _, err := dest.TryReusingBlob(ctx, types.BlobInfo{Digest: l.Digest, Size: l.Size}, cache, false)
		if err != nil {
			return fmt.Errorf("find layer: %w", err)
		}
		if !ok {
			return &NeedError{[]digest.Digest{l.DiffID}}
		}
	}
	if err := dest.PutManifest(ctx, a.Instance, nil); err != nil {
		return fmt.Errorf("record manifest: %w", err)
	}
	if err := dest.PutSignatures(ctx, signatures(a), nil); err != nil {
		return fmt.Errorf("record signatures: %w", err)
	}
	if err := dest.Commit(ctx, r.top); err != nil {
		return fmt.Errorf("record image: %w", err)
	}
	if len(a.Of.Names) == 0 {
		return nil
	}
	id := strings.TrimPrefix(string(config.Digest), "sha256:")
	if err := s.store.AddNames(id, a.Of.Names); err != nil {
		return fmt.Errorf("name image: %w", err)
	}
	return nil
}

// signatures are those of what is loaded.
func signatures(a *archive.Image) [][]byte {
	var instance digest.Digest
	if a.IsList() {
		instance = a.InstanceDigest()
	}
	blobs := [][]byte{}
	for _, sig := range a.Signatures {
		if sig.Instance == instance {
			blobs = append(blobs, sig.Data)
		}
	}
	return blobs
}
