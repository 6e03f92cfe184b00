package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/precache/precache-agent/internal/manifest"
)

const (
	maxMembers    = 10000   // of one archive: 500 layers in each of a dozen architectures fit
	maxMemberName = 1024    // bytes
	maxTail       = 1 << 20 // bytes after a tar's end
)

// A Partition is where archives are staged, read-only.
type Partition struct {
	Root *os.Root
	Path string // where Root is, for messages and for the policy's scopes
	Room *Room  // shared by everything that reads at the same time; nil: unbounded

	// Moved is told how many bytes have been read so far, whenever there are
	// more; by any goroutine. Nil: nobody is.
	Moved func(bytes int64)

	read atomic.Int64
}

// BytesRead is how many bytes of archives have been read so far.
func (p *Partition) BytesRead() int64 { return p.read.Load() }

// An Archive is one staged image, not yet looked into.
type Archive struct {
	Name string // of the file or folder on the partition
	Base string // Name without the suffix
	Size int64  // of the file, or of all files of the folder, in bytes

	part   *Partition
	folder bool
	read   atomic.Int64
}

// BytesRead is how many bytes of the archive have been read so far.
func (a *Archive) BytesRead() int64 { return a.read.Load() }

// Find returns the archive of img: the first file or folder that there is
// under its names. The error's reason is MissingArchive if there is none.
func (p *Partition) Find(img manifest.Image) (*Archive, error) {
	names := img.ArchiveNames()
	for _, base := range names {
		for _, suffix := range manifest.Suffixes {
			fi, err := p.Root.Stat(base + suffix)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENAMETOOLONG) {
				continue
			}
			if err != nil {
				return nil, fault(ReadFailed, "look for archive: %w", err)
			}
			a := &Archive{Name: base + suffix, Base: base, Size: fi.Size(), part: p, folder: fi.IsDir()}
			switch {
			case a.folder != (suffix == ""):
				continue // a folder named x.tgz, or a file without suffix, is something else
			case a.folder:
				if a.Size, err = folderSize(p.Root, base); err != nil {
					return nil, classify(ReadFailed, fmt.Errorf("look into %s: %w", base, err))
				}
			case !fi.Mode().IsRegular():
				return nil, fault(Unsupported, "%s is not a regular file", a.Name)
			}
			return a, nil
		}
	}
	return nil, fault(MissingArchive, "no archive %s with suffix %s, and no folder", strings.Join(names, " or "), strings.Join(manifest.Suffixes[:len(manifest.Suffixes)-1], " "))
}

// Path is the archive's place without its suffix: where `skopeo copy dir:`
// would have found the image, and so its scope in policy.json.
func (a *Archive) Path() string { return path.Join(a.part.Path, a.Base) }

// A member is one file of an archive, at the reader.
type member struct {
	name string // clean, slash-separated, relative, not outside
	size int64
	link string // of a symbolic link, its target
	r    io.Reader
}

var errStop = errors.New("stop")

// A visitorError is an error of the visitor, on its way through the archive.
type visitorError struct{ err error }

func (e *visitorError) Error() string { return e.err.Error() }

func visitorFailed(err error) error {
	if err == nil {
		return nil
	}
	return &visitorError{err}
}

// each calls f with the archive's members, in the order that is cheapest, until
// f fails; whole reports whether that was to the end. A folder's metadata
// comes before its blobs; a tar's members come as they stand.
func (a *Archive) each(ctx context.Context, t *tenant, f func(*member) error) (whole bool, err error) {
	if a.folder {
		err = a.eachFile(ctx, f)
	} else {
		err = a.eachMember(ctx, t, f)
	}
	if errors.Is(err, errStop) {
		return false, nil
	}
	var v *visitorError
	if errors.As(err, &v) {
		return false, v.err // not the archive's
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", a.Name, classify(CorruptArchive, err))
	}
	return true, nil
}

func (a *Archive) open(ctx context.Context, name string) (*file, error) {
	f, err := a.part.Root.Open(name)
	if err != nil {
		return nil, fault(ReadFailed, "open: %w", err)
	}
	return &file{ctx: ctx, f: f, a: a}, nil
}

// A file counts what is read of it, stops when its context does, and marks its errors as the partition's.
type file struct {
	ctx context.Context
	f   *os.File
	a   *Archive
}

func (r *file) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.f.Read(p)
	r.a.read.Add(int64(n))
	if total := r.a.part.read.Add(int64(n)); n > 0 && r.a.part.Moved != nil {
		r.a.part.Moved(total)
	}
	if err != nil && err != io.EOF {
		err = &Error{ReadFailed, err}
	}
	return n, err
}

// Seek lets archive/tar skip members of a plain tar.
func (r *file) Seek(offset int64, whence int) (int64, error) { return r.f.Seek(offset, whence) }
func (r *file) Close() error                                 { return r.f.Close() }

func (a *Archive) eachMember(ctx context.Context, t *tenant, f func(*member) error) error {
	file, err := a.open(ctx, a.Name)
	if err != nil {
		return err
	}
	defer file.Close()
	plain, compression, err := decompress(ctx, file, t)
	if err != nil {
		return err
	}
	defer plain.Close()
	stream := io.Reader(plain)
	if compression == None {
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return fault(ReadFailed, "seek: %w", err)
		}
		stream = file
	}

	seen := map[string]bool{}
	tr := tar.NewReader(stream)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			if len(seen) == 0 {
				return fault(CorruptArchive, "no member in it")
			}
			return drain(stream)
		}
		if err != nil {
			return noEOF(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := memberName(h.Name)
		if err != nil {
			return err
		}
		m := &member{name: name, size: h.Size, r: tr}
		switch h.Typeflag {
		case tar.TypeDir:
			continue
		case tar.TypeReg:
			for k := range h.PAXRecords {
				if strings.HasPrefix(k, "GNU.sparse.") {
					return fault(Unsupported, "member %q is sparse", name)
				}
			}
		case tar.TypeSymlink: // docker-archive has them for repeated layers
			if len(h.Linkname) > maxMemberName {
				return fault(CorruptArchive, "the link of member %q has %d bytes", name, len(h.Linkname))
			}
			m.size, m.link = 0, h.Linkname
		default:
			return fault(Unsupported, "member %q has type %q", name, h.Typeflag)
		}
		if seen[name] {
			return fault(CorruptArchive, "member %q stands twice", name)
		}
		if len(seen) == maxMembers {
			return fault(Unsupported, "more than %d members", maxMembers)
		}
		seen[name] = true
		if err := f(m); err != nil {
			return noEOF(err)
		}
	}
}

// drain reads what follows the end of a tar, so that the compression's own checksum is read too.
func drain(r io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxTail+1))
	if err == nil && n > maxTail {
		return fault(CorruptArchive, "more than %d KiB follow the end of the tar", maxTail>>10)
	}
	return noEOF(err)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// memberName is name without what cannot matter, or an error if it leaves the archive.
func memberName(name string) (string, error) {
	if len(name) > maxMemberName {
		return "", fault(CorruptArchive, "a member name has %d bytes", len(name))
	}
	if strings.HasPrefix(name, "/") || slices.Contains(strings.Split(name, "/"), "..") || strings.ContainsRune(name, 0) {
		return "", fault(CorruptArchive, "member %q leaves the archive", name)
	}
	return path.Clean(name), nil
}

func walk(root *os.Root, folder string, f func(name string, fi fs.FileInfo) error) error {
	members := 0
	return fs.WalkDir(root.FS(), folder, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if members++; members > maxMembers {
			return fault(Unsupported, "more than %d files", maxMembers)
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		return f(name, fi)
	})
}

func folderSize(root *os.Root, folder string) (n int64, err error) {
	err = walk(root, folder, func(_ string, fi fs.FileInfo) error {
		n += fi.Size()
		return nil
	})
	return n, err
}

func (a *Archive) eachFile(ctx context.Context, f func(*member) error) error {
	var members []*member
	err := walk(a.part.Root, a.Name, func(name string, fi fs.FileInfo) error {
		if fi.Mode().IsRegular() {
			members = append(members, &member{name: strings.TrimPrefix(name, a.Name+"/"), size: fi.Size()})
		}
		return nil
	})
	if err != nil {
		return classify(ReadFailed, err)
	}
	slices.SortStableFunc(members, func(x, y *member) int { return rank(x) - rank(y) })
	for _, m := range members {
		file, err := a.open(ctx, path.Join(a.Name, m.name))
		if err != nil {
			return err
		}
		m.r = io.LimitReader(file, m.size) // what is appended meanwhile does not belong to it
		err = f(m)
		file.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// rank orders a folder's files: what says which image it is, what may be its config, the rest.
func rank(m *member) int {
	switch kind, _ := kindOf(m.name); {
	case kind == isTop || kind == isIndex || kind == isInstance || kind == isSignature:
		return 0
	case m.size <= maxHeld:
		return 1
	}
	return 2
}
