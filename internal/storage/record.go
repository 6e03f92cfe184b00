package storage

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containers/image/v5/directory"
	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/image"
	"github.com/containers/image/v5/pkg/blobinfocache/memory"
	"github.com/containers/image/v5/signature"
	is "github.com/containers/image/v5/storage"
	"github.com/containers/image/v5/types"
	"github.com/containers/storage"
	"github.com/containers/storage/pkg/ioutils"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

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

// Allowed asks policy.json about an image. The error's reason is archive.Policy if it refuses it.
func (s *Store) Allowed(ctx context.Context, img *archive.Image) error {
	r, err := s.prepare(ctx, img)
	r.close()
	return err
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

// record records the images whose layers are in the store, and their names,
// and writes images.json once for all that are new. What needs more, an image
// that is there under another name or a name that moves, the library does.
func (s *Store) record(ctx context.Context, images []*archive.Image, records []*record, errs []error) {
	s.lib.Lock()
	defer s.lib.Unlock()
	if err := s.recordFresh(images, errs); err != nil {
		for i := range errs {
			if errs[i] == nil {
				errs[i] = err
			}
		}
		return
	}
	for n, a := range images {
		if errs[n] == errNotFresh {
			errs[n] = s.recordOne(ctx, records[n], a)
		}
	}
}

// errNotFresh marks an image that the library has to record.
var errNotFresh = errors.New("image is there, or its name is")

// recordFresh records the images that are new, under new names. The layers stay
// locked meanwhile, so that nobody removes what no image seems to need.
func (s *Store) recordFresh(images []*archive.Image, errs []error) error {
	if err := s.openLayers(); err != nil {
		return err
	}
	defer s.layerIndex.close()
	layers := whole(s.layerIndex)
	if err := s.imageIndex.open(); err != nil {
		return err
	}
	defer s.imageIndex.close()
	ids, names := map[string]bool{}, map[string]bool{}
	for _, image := range s.imageIndex.parsed {
		ids[image.ID] = true
		for _, name := range image.Names {
			names[name] = true
		}
	}
	var fresh []storage.Image
	for n, a := range images {
		if errs[n] != nil {
			continue
		}
		stacked := !slices.ContainsFunc(chain(a.Layers), func(id string) bool { return !layers[id] })
		known := ids[imageID(a)] || slices.ContainsFunc(a.Of.AllNames(), func(name string) bool { return names[name] })
		if known || !stacked || len(a.Layers) == 0 || !s.parallel() {
			errs[n] = errNotFresh
			continue
		}
		image, data := describe(a)
		if errs[n] = s.writeData(image.ID, data); errs[n] != nil {
			continue
		}
		ids[image.ID] = true
		for _, name := range image.Names {
			names[name] = true
		}
		fresh = append(fresh, image)
	}
	if len(fresh) == 0 {
		return nil
	}
	if err := s.imageIndex.add(fresh); err != nil {
		for _, image := range fresh {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.images(), image.ID)))
		}
		return err
	}
	return nil
}

func imageID(a *archive.Image) string { return digest.FromBytes(a.Config).Encoded() }

func (s *Store) images() string { return filepath.Join(s.graphRoot, s.driver.String()+"-images") }

// describe makes the record that the library makes of an image, and its big
// data, in the same order (containers/image, storage/storage_dest.go,
// CommitWithOptions and PutSignaturesWithFormat).
func describe(a *archive.Image) (storage.Image, []storage.ImageBigDataOption) {
	instance := a.InstanceDigest()
	ids := chain(a.Layers)
	var sizes = []int{}
	var joined []byte
	for _, sig := range signatures(a) {
		sizes = append(sizes, len(sig))
		joined = append(joined, sig...)
	}
	metadata := struct {
		SignatureSizes  []int                   `json:"signature-sizes,omitempty"`
		SignaturesSizes map[digest.Digest][]int `json:"signatures-sizes,omitempty"`
	}{sizes, map[digest.Digest][]int{instance: sizes}}
	text, err := json.Marshal(metadata)
	if err != nil {
		panic(err) // numbers and digests
	}
	var data []storage.ImageBigDataOption
	add := func(key string, b []byte) {
		data = append(data, storage.ImageBigDataOption{Key: key, Data: b, Digest: digest.FromBytes(b)})
	}
	add(string(digest.FromBytes(a.Config)), a.Config)
	if a.IsList() {
		add("manifest-"+string(a.Digest), a.Manifest)
	}
	add("manifest-"+string(instance), a.Instance)
	add(storage.ImageDigestBigDataKey, a.Instance)
	if len(joined) > 0 {
		add("signatures", joined)
	}
	add("signature-"+instance.Encoded(), joined)

	image := storage.Image{
		ID: imageID(a), Digest: a.Digest, Names: a.Of.AllNames(),
		TopLayer: ids[len(ids)-1], Metadata: string(text), Created: created(a.Config),
		BigDataSizes: map[string]int64{}, BigDataDigests: map[string]digest.Digest{},
	}
	slices.Reverse(image.Names) // the newest first, as if each had been added after the other
	image.NamesHistory = slices.Clone(image.Names)
	for _, d := range data {
		image.BigDataNames = append(image.BigDataNames, d.Key)
		image.BigDataSizes[d.Key] = int64(len(d.Data))
		image.BigDataDigests[d.Key] = d.Digest
	}
	return image, data
}

// created is when a config says that its image was made.
func created(config []byte) time.Time {
	var c struct {
		Created *time.Time `json:"created"`
	}
	if err := json.Unmarshal(config, &c); err != nil || c.Created == nil || c.Created.IsZero() {
		return time.Now().UTC()
	}
	return *c.Created
}

// writeData writes an image's big data, before anything names it. It is
// durable with the next Sync.
func (s *Store) writeData(id string, data []storage.ImageBigDataOption) error {
	dir := filepath.Join(s.images(), id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make image folder: %w", err)
	}
	for _, d := range data {
		options := &ioutils.AtomicFileWriterOptions{NoSync: true}
		if err := ioutils.AtomicWriteFileWithOpts(filepath.Join(dir, dataName(d.Key)), d.Data, 0o600, options); err != nil {
			return fmt.Errorf("write %s of image: %w", d.Key, err)
		}
	}
	return nil
}

// dataName is the file name of big data (containers/storage, makeBigDataBaseName).
func dataName(key string) string {
	if strings.Trim(key, ".0123456789abcdefghijklmnopqrstuvwxyz") == "" {
		return key
	}
	return "=" + base64.StdEncoding.EncodeToString([]byte(key))
}

// recordOne records an image through the library.
func (s *Store) recordOne(ctx context.Context, r *record, a *archive.Image) (err error) {
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
	// Otherwise the library parses the manifest, under the name of the list, and refuses it.
	if noter, ok := dest.(interface {
		NoteOriginalOCIConfig(*v1.Image, error) error
	}); ok {
		var config v1.Image
		if err := noter.NoteOriginalOCIConfig(&config, json.Unmarshal(a.Config, &config)); err != nil {
			return fmt.Errorf("record config: %w", err)
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
	if err := s.store.AddNames(imageID(a), a.Of.Names); err != nil {
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
