package storetest

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	tsstorage "github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"
)

// A Layer is a line of layers.json, in the keys that the tests name.
type Layer struct {
	ID               string         `json:"id"`
	Parent           string         `json:"parent"`
	CompressedDigest string         `json:"compressed-diff-digest"`
	DiffID           string         `json:"diff-digest"`
	Size             int64          `json:"diff-size"`
	Flags            map[string]any `json:"flags"`

	raw map[string]any // all of it
}

// An Image is an image of images.json, in the keys that the tests name.
type Image struct {
	ID       string           `json:"id"`
	Digest   string           `json:"digest"`
	Names    []string         `json:"names"`
	TopLayer string           `json:"layer"`
	Metadata string           `json:"metadata"`
	Data     []string         `json:"big-data-names"`
	Sizes    map[string]int64 `json:"big-data-sizes"`

	raw map[string]any
}

// Layers reads layers.json; the layers are by their IDs.
func (s *Store) Layers(t testing.TB) map[string]Layer {
	t.Helper()
	layers := map[string]Layer{}
	for _, raw := range s.readIndex(t, "layers") {
		var l Layer
		l.raw = decode(t, raw, &l)
		if _, again := layers[l.ID]; again {
			t.Errorf("%s: layer %s stands twice", s.Root, l.ID)
		}
		layers[l.ID] = l
	}
	return layers
}

// Images reads images.json; the images are by their IDs.
func (s *Store) Images(t testing.TB) map[string]Image {
	t.Helper()
	images := map[string]Image{}
	for _, raw := range s.readIndex(t, "images") {
		var i Image
		i.raw = decode(t, raw, &i)
		if _, again := images[i.ID]; again {
			t.Errorf("%s: image %s stands twice", s.Root, i.ID)
		}
		images[i.ID] = i
	}
	return images
}

// Names are the names of all images, each with the image's ID.
func (s *Store) Names(t testing.TB) map[string]string {
	t.Helper()
	names := map[string]string{}
	for _, img := range s.Images(t) {
		for _, name := range img.Names {
			if other, taken := names[name]; taken {
				t.Errorf("%s: %s is the name of %s and of %s", s.Root, name, other, img.ID)
			}
			names[name] = img.ID
		}
	}
	return names
}

func decode(t testing.TB, raw json.RawMessage, known any) (all map[string]any) {
	t.Helper()
	if err := errors.Join(json.Unmarshal(raw, known), json.Unmarshal(raw, &all)); err != nil {
		t.Fatal(err)
	}
	return all
}

func (s *Store) readIndex(t testing.TB, what string) (all []json.RawMessage) {
	t.Helper()
	file := filepath.Join(s.Root, s.Driver+"-"+what, what+".json")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 {
		return nil
	} else if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return all
}

// tree is where a layer's own files are.
func (s *Store) tree(id string) string {
	if s.Driver == "vfs" {
		return filepath.Join(s.Root, "vfs", "dir", id)
	}
	return filepath.Join(s.Root, s.Driver, id, "diff")
}

// data reads an image's files, by their keys.
func (s *Store) data(id string) (map[string]string, error) {
	dir := filepath.Join(s.Root, s.Driver+"-images", id)
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	data := map[string]string{}
	for _, f := range files {
		key := f.Name()
		if encoded, ok := strings.CutPrefix(key, "="); ok { // the library's makeBigDataBaseName
			b, err := base64.StdEncoding.DecodeString(encoded)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", f.Name(), err)
			}
			key = string(b)
		}
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return nil, err
		}
		data[key] = string(b)
	}
	return data, nil
}

// split opens the record from which, with the layer's files, the layer's tar is made again.
func (s *Store) split(id string) (io.ReadCloser, error) {
	f, err := os.Open(filepath.Join(s.Root, s.Driver+"-layers", id+".tar-split.gz"))
	if err != nil {
		return nil, err
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return struct {
		io.Reader
		io.Closer
	}{z, f}, nil
}

// rebuild makes a layer's tar again and returns its digest and its size.
func (s *Store) rebuild(id string, out io.Writer) (digest string, size int64, err error) {
	split, err := s.split(id)
	if err != nil {
		return "", 0, err
	}
	defer split.Close()
	root, err := os.Open(s.tree(id))
	if err != nil {
		return "", 0, err
	}
	defer root.Close()
	h, n := sha256.New(), counter(0)
	err = asm.WriteOutputTarStream(inside{root}, tsstorage.NewJSONUnpacker(split), io.MultiWriter(h, &n, out))
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), int64(n), err
}

// named returns the paths that a layer names, without dots and slashes that mean nothing. The root is ".".
func (s *Store) named(id string) (map[string]bool, error) {
	names := map[string]bool{}
	pr, pw := io.Pipe()
	go func() {
		_, _, err := s.rebuild(id, pw)
		pw.CloseWithError(err)
	}()
	defer pr.Close()
	r := tar.NewReader(pr)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return names, nil
		} else if err != nil {
			return nil, err
		}
		names[path.Clean("./"+path.Clean("/"+h.Name))] = true
	}
}

// inside opens a layer's files without ever leaving it, whatever links say.
type inside struct{ root *os.File }

func (i inside) Get(name string) (io.ReadCloser, error) {
	fd, err := unix.Openat2(int(i.root.Fd()), name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}
