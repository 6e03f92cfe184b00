package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containers/storage"
	drivers "github.com/containers/storage/drivers"
	"github.com/containers/storage/pkg/idtools"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	tsstorage "github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/archive"
)

// A NeedError says that layers are neither staged nor in the store after all.
type NeedError struct{ DiffIDs []digest.Digest }

// Needed returns the layers, by diffID.
func (e *NeedError) Needed() []digest.Digest { return e.DiffIDs }

func (e *NeedError) Error() string {
	return fmt.Sprintf("layer %s is neither staged nor in the store", e.DiffIDs[0])
}

// layerID is the ID that containers-storage gives a layer: it says where in a
// chain the layer is (containers/image, storage/storage_dest.go).
func layerID(parent string, diffID digest.Digest) string {
	if parent == "" {
		return diffID.Encoded()
	}
	return digest.FromString(parent + "+" + diffID.Encoded()).Encoded()
}

// chain returns the IDs of an image's layers, base first.
func chain(layers []archive.Layer) []string {
	ids := make([]string, len(layers))
	parent := ""
	for i, l := range layers {
		ids[i] = layerID(parent, l.DiffID)
		parent = ids[i]
	}
	return ids
}

// has reports whether a layer is in the store.
func (s *Store) has(id string) bool {
	s.lib.Lock()
	defer s.lib.Unlock()
	_, err := s.store.Layer(id)
	return err == nil
}

// Missing returns the diffIDs of an image's layers that must be read from an
// archive: they are not in the store at their place, not staged, and not in
// the store at another place, from where they could be copied.
func (s *Store) Missing(_ context.Context, layers []archive.Layer) ([]digest.Digest, error) {
	var missing []digest.Digest
	for i, id := range chain(layers) {
		d := layers[i].DiffID
		if s.has(id) || s.pick(d, nil) != nil {
			continue
		}
		if source, err := s.copySource(d); err != nil {
			return nil, err
		} else if source == "" {
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// copySource returns a layer of the store with the same content, or "".
func (s *Store) copySource(d digest.Digest) (string, error) {
	s.mu.Lock()
	broken := s.broken[d]
	s.mu.Unlock()
	if broken || !s.parallel() {
		return "", nil
	}
	s.lib.Lock()
	all, err := s.store.LayersByUncompressedDigest(d)
	s.lib.Unlock()
	if err != nil && !errors.Is(err, storage.ErrLayerUnknown) {
		return "", fmt.Errorf("look for layer %s: %w", d, err)
	}
	for _, l := range all {
		if _, err := os.Stat(s.splitPath(l.ID)); err == nil {
			return l.ID, nil
		}
	}
	return "", nil
}

func (s *Store) splitPath(id string) string { return filepath.Join(s.layers(), id+".tar-split.gz") }

// Sync returns when all that was written to the store before survives a power
// cut (syncfs(2); errors of writing back are reported from Linux 5.8 on).
func (s *Store) Sync(context.Context) error {
	if err := unix.Syncfs(int(s.root.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", s.graphRoot, err)
	}
	return nil
}

// Commit puts images into the store: their layers, parents first, then the
// records and the names. The policy is asked before anything of an image is
// committed. The errors are in the order of the images; nil means that the
// image is in the store under all its names. An error has left nothing of its
// image but whole layers.
func (s *Store) Commit(ctx context.Context, images []*archive.Image) []error {
	errs := make([]error, len(images))
	records := make([]*record, len(images))
	copied := false
	taken, uses := map[string]bool{}, map[digest.Digest]int{}
	for i, img := range images {
		if records[i], errs[i] = s.prepare(ctx, img); errs[i] == nil && s.parallel() {
			errs[i] = s.copies(ctx, img, taken, uses, &copied)
		}
		defer records[i].close()
	}
	if copied { // as for what was staged before
		if err := s.Sync(ctx); err != nil {
			for i := range errs {
				errs[i] = err
			}
		}
	}
	if s.parallel() {
		s.commitLayers(images, errs)
	}
	s.record(ctx, images, records, errs)
	return errs
}

// copies stages again what the images before this one take away: the same
// content at another place in a chain is another layer. Taken are the IDs that
// they bring, uses how often they need a diffID.
func (s *Store) copies(ctx context.Context, img *archive.Image, taken map[string]bool, uses map[digest.Digest]int, copied *bool) error {
	for i, id := range chain(img.Layers) {
		if taken[id] || s.has(id) {
			continue
		}
		layer := img.Layers[i]
		taken[id] = true
		uses[layer.DiffID]++
		for s.count(layer.DiffID) < uses[layer.DiffID] {
			if err := s.copyLayer(ctx, layer); err != nil {
				return err
			}
			*copied = true
		}
	}
	return nil
}

func (s *Store) count(d digest.Digest) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.staged[d])
}

// copyLayer stages a layer once more, from where it is staged or in the store.
func (s *Store) copyLayer(ctx context.Context, layer archive.Layer) error {
	need := &NeedError{[]digest.Digest{layer.DiffID}}
	var tree, split string
	var like staged
	if l := s.pick(layer.DiffID, nil); l != nil {
		tree, split, like = filepath.Join(l.path, treeName), filepath.Join(l.path, splitName), *l
	} else {
		id, err := s.copySource(layer.DiffID)
		if err != nil {
			return err
		}
		if id == "" {
			return need
		}
		tree, split = filepath.Join(s.home(), id, "diff"), s.splitPath(id)
		s.lib.Lock()
		from, err := s.store.Layer(id)
		s.lib.Unlock()
		if err == nil {
			like.Blob, like.Compression = from.CompressedDigest, from.CompressionType
		}
	}
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := assemble(pw, tree, split)
		pw.CloseWithError(err)
		done <- err
	}()
	l, err := s.extract(layer.DiffID, pr)
	pr.Close()
	<-done
	if err != nil {
		if ctx.Err() != nil || errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("copy layer %s: %w", layer.DiffID, err)
		}
		if like.path != "" && like.readMark() == nil {
			return &archive.Error{Reason: archive.Unsupported, Err: fmt.Errorf("layer %s stands twice, and cannot be had from what it makes: %w", layer.DiffID, err)}
		}
		s.mu.Lock()
		s.broken[layer.DiffID] = true // do not try it again, read it from an archive
		s.mu.Unlock()
		return need
	}
	l.Blob, l.Compression = like.Blob, like.Compression
	return s.mark(l)
}

// assemble writes the tar that a layer was made of.
func assemble(w io.Writer, tree, split string) error {
	f, err := os.Open(split)
	if err != nil {
		return fmt.Errorf("open tar-split: %w", err)
	}
	defer f.Close()
	plain, err := gunzip(f)
	if err != nil {
		return fmt.Errorf("read tar-split: %w", err)
	}
	root, err := os.Open(tree)
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer root.Close()
	return inRoot(root, func() error {
		return asm.WriteOutputTarStream(regularFiles{}, tsstorage.NewJSONUnpacker(plain), w)
	})
}

// regularFiles are the files below the root directory. What a layer made of a
// file afterwards may be a pipe or a device, whose opening has effects.
type regularFiles struct{}

func (regularFiles) Get(name string) (io.ReadCloser, error) {
	// Nobody else writes here: what this sees is what is opened.
	path := filepath.Join("/", name)
	if fi, err := os.Lstat(path); err != nil {
		return nil, err
	} else if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// A placement is a layer that a batch brings, and where it belongs.
type placement struct {
	layer  storage.Layer
	staged *staged
	users  []int // images of the batch that need it
	err    error
}

// commitLayers moves what the images need from the staging folder into the
// store. It writes layers.json twice: first with every new layer flagged
// incomplete, so that whoever comes after a crash removes it, then without.
func (s *Store) commitLayers(images []*archive.Image, errs []error) {
	fail := func(err error) {
		for i := range errs {
			if errs[i] == nil {
				errs[i] = err
			}
		}
	}
	s.lib.Lock()
	defer s.lib.Unlock()
	elsewhere := s.elsewhere(images)
	if err := s.openLayers(); err != nil {
		fail(err)
		return
	}
	defer s.layerIndex.close()
	has := whole(s.layerIndex)
	for id := range elsewhere {
		has[id] = true
	}
	plan := s.plan(has, images, errs)
	if len(plan) == 0 {
		return
	}
	flagged := make([]storage.Layer, len(plan))
	for i, p := range plan {
		flagged[i] = p.layer
		flagged[i].Flags = map[string]any{"incomplete": true}
	}
	if _, err := s.layerIndex.write(flagged); err != nil {
		fail(err)
		return
	}
	var before, after unix.Stat_t
	if err := unix.Stat(s.home(), &before); err != nil {
		fail(fmt.Errorf("look at driver's folder: %w", err))
		return
	}
	err := withoutMount(s.home(), func() error {
		if err := unix.Stat(s.home(), &after); err != nil || after.Dev != before.Dev || after.Ino != before.Ino {
			return errors.Join(err, fmt.Errorf("another folder is mounted on %s", s.home()))
		}
		bad := map[string]bool{}
		for _, p := range plan {
			if bad[p.layer.Parent] {
				p.err = fmt.Errorf("its parent was not committed")
			} else {
				p.err = s.place(p)
			}
			bad[p.layer.ID] = p.err != nil
		}
		return nil
	})
	var whole []storage.Layer
	for _, p := range plan {
		if err != nil && p.err == nil {
			p.err = err
		}
		if p.err == nil {
			whole = append(whole, p.layer)
			continue
		}
		for _, i := range p.users {
			if errs[i] == nil {
				errs[i] = fmt.Errorf("commit layer %s: %w", p.layer.UncompressedDigest, p.err)
			}
		}
	}
	if err := s.layerIndex.add(whole); err != nil {
		fail(err)
	}
}

// openLayers opens the index of layers when none in it is incomplete. The
// library removes those when it next looks.
func (s *Store) openLayers() error {
	for tries := 0; ; tries++ {
		if err := s.layerIndex.open(); err != nil {
			return err
		}
		if len(whole(s.layerIndex)) == len(s.layerIndex.parsed) {
			return nil
		}
		s.layerIndex.close()
		if tries == 2 {
			return errors.New("incomplete layers of a crash are in the store, and stay there")
		}
		if _, err := s.store.Layers(); err != nil {
			return fmt.Errorf("remove incomplete layers: %w", err)
		}
	}
}

// elsewhere returns those of the images' layers that are in a read-only store beside this one.
func (s *Store) elsewhere(images []*archive.Image) map[string]bool {
	ids := map[string]bool{}
	for _, img := range images {
		for _, id := range chain(img.Layers) {
			if l, err := s.store.Layer(id); err == nil && l.ReadOnly {
				ids[id] = true
			}
		}
	}
	return ids
}

// plan says which layers the images bring, parents first.
func (s *Store) plan(has map[string]bool, images []*archive.Image, errs []error) []*placement {
	var plan []*placement
	at := map[string]*placement{}
	used := map[*staged]bool{}
	now := time.Now().UTC()
	for n, img := range images {
		if errs[n] != nil {
			continue
		}
		parent := ""
		for i, id := range chain(img.Layers) {
			l := img.Layers[i]
			p := at[id]
			if p == nil && !has[id] {
				from := s.pick(l.DiffID, used)
				if from == nil {
					errs[n] = &NeedError{[]digest.Digest{l.DiffID}}
					break
				}
				used[from] = true
				p = &placement{staged: from, layer: storage.Layer{
					ID: id, Parent: parent, Created: now,
					UncompressedDigest: from.DiffID, UncompressedSize: from.Size,
					UIDs: from.UIDs, GIDs: from.GIDs,
				}}
				// Only what was read may be found by its blob's digest: that another blob has the same content is hearsay.
				if l.Digest == from.Blob {
					p.layer.CompressedDigest, p.layer.CompressedSize, p.layer.CompressionType = l.Digest, l.Size, from.Compression
				}
				at[id] = p
				plan = append(plan, p)
			}
			if p != nil {
				p.users = append(p.users, n)
			}
			parent = id
		}
	}
	return plan
}

// place makes the driver's folder of a layer and moves the staged files into
// it. Whatever comes of it, the staged layer is used up.
func (s *Store) place(p *placement) (err error) {
	id := p.layer.ID
	defer func() {
		s.forget(p.staged)
		err = errors.Join(err, os.RemoveAll(p.staged.path))
	}()
	// A leftover of a crash is removed by Create, but with an empty link file
	// the driver would remove the links of all layers.
	link := filepath.Join(s.home(), id, "link")
	if b, err := os.ReadFile(link); err == nil && len(b) == 0 {
		if err := os.Remove(link); err != nil {
			return fmt.Errorf("remove empty link: %w", err)
		}
	}
	if err := s.driver.Create(id, p.layer.Parent, &drivers.CreateOpts{IDMappings: &idtools.IDMappings{}}); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.driver.Remove(id), removeIfThere(s.splitPath(id)))
		}
	}()
	// From here on it is not whole: a next run must not take it for staged.
	if err := os.Remove(filepath.Join(p.staged.path, markName)); err != nil {
		return fmt.Errorf("unmark staged layer: %w", err)
	}
	tree := filepath.Join(p.staged.path, treeName)
	// The root has the mode and the owner that the driver would have given it.
	var st unix.Stat_t
	like := filepath.Join(s.home(), id, "diff")
	if p.staged.OwnRoot {
		like = tree
	}
	if err := unix.Stat(like, &st); err != nil {
		return fmt.Errorf("look at root: %w", err)
	}
	if err := unix.Chown(tree, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("set owner of root: %w", err)
	}
	if err := unix.Chmod(tree, st.Mode&0o7777); err != nil {
		return fmt.Errorf("set mode of root: %w", err)
	}
	if err := os.Rename(filepath.Join(p.staged.path, splitName), s.splitPath(id)); err != nil {
		return fmt.Errorf("place tar-split: %w", err)
	}
	mode := os.FileMode(st.Mode & 0o777)
	out := &drivers.DriverWithDifferOutput{Target: tree, RootDirMode: &mode}
	if err := s.driver.(drivers.DriverWithDiffer).ApplyDiffFromStagingDirectory(id, p.layer.Parent, out, nil); err != nil {
		return fmt.Errorf("place files: %w", err)
	}
	return nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
