package storage

import (
	stdtar "archive/tar"
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	sarchive "github.com/containers/storage/pkg/archive"
	"github.com/containers/storage/pkg/idtools"
	"github.com/containers/storage/pkg/system"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/archive/tar"
	tsstorage "github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/archive"
)

// An extractor makes files of a layer's tar and, in the same reading, the
// tar-split record of what the files do not say. The library does it in two:
// containers/storage, pkg/archive, Unpack, and tar-split, tar/asm,
// NewInputTarStream. What this makes is the same, to the last time and mode;
// internal/integration compares it with what skopeo makes.
//
// It runs with the layer's folder as its root directory: a name, a symbolic or
// a hard link leads nowhere else.
type extractor struct {
	options    *sarchive.TarOptions
	packer     tsstorage.Packer
	dirs       []*tar.Header // whose times are set last: making files changes them
	parent     string        // that is known to be there
	uids, gids map[uint32]bool
	ownRoot    bool // the tar says what its root is like
	buf        []byte
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// extractTo makes the tree of a plain tar in root, and the record in split. It
// reads the tar to its end, and fails if its digest is not l's diffID.
func (l *staged) extractTo(root *os.File, split string, plain io.Reader, options *sarchive.TarOptions) (err error) {
	f, err := os.OpenFile(split, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("create tar-split: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("write tar-split: %w", cerr)
		}
	}()
	w := bufio.NewWriterSize(f, 64<<10)
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return fmt.Errorf("compress tar-split: %w", err)
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	x := &extractor{
		options: options, packer: tsstorage.NewJSONPacker(z), buf: *buf,
		uids: map[uint32]bool{}, gids: map[uint32]bool{},
	}
	digester, counter := digest.SHA256.Digester(), &count{}
	r := bufio.NewReaderSize(io.TeeReader(plain, io.MultiWriter(digester.Hash(), counter)), 64<<10)
	if err := inRoot(root, func() error { return x.all(r) }); err != nil {
		return err
	}
	if err := errors.Join(z.Close(), w.Flush()); err != nil {
		return fmt.Errorf("write tar-split: %w", err)
	}
	l.Size, l.OwnRoot = counter.n, x.ownRoot
	l.UIDs, l.GIDs = slices.Sorted(maps.Keys(x.uids)), slices.Sorted(maps.Keys(x.gids))
	if got := digester.Digest(); got != l.DiffID {
		return &archive.Error{Reason: archive.DigestMismatch, Err: fmt.Errorf("content has diffID %s, the config says %s", got, l.DiffID)}
	}
	return nil
}

func (x *extractor) all(r io.Reader) error {
	tr := tar.NewReader(r)
	tr.RawAccounting = true
	for {
		h, err := tr.Next()
		if err != nil && err != io.EOF {
			return err
		}
		if err := x.segment(tr.RawBytes()); err != nil {
			return err
		}
		if err == io.EOF {
			break
		}
		if err := x.entry(h, tr); err != nil {
			return fmt.Errorf("extract %.200q: %w", h.Name, err)
		}
	}
	for _, h := range x.dirs {
		if err := system.Chtimes(filepath.Join("/", h.Name), h.AccessTime, h.ModTime); err != nil {
			return err
		}
	}
	for { // what follows the end of the tar belongs to the digest
		n, err := r.Read(x.buf)
		if err := x.segment(x.buf[:n]); err != nil {
			return err
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (x *extractor) segment(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if _, err := x.packer.AddEntry(tsstorage.Entry{Type: tsstorage.SegmentType, Payload: b}); err != nil {
		return fmt.Errorf("write tar-split: %w", err)
	}
	return nil
}

// entry takes down one entry of the tar and makes what it says.
func (x *extractor) entry(h *tar.Header, tr *tar.Reader) error {
	if !strings.HasPrefix(filepath.Base(h.Name), sarchive.WhiteoutPrefix) {
		x.uids[uint32(h.Uid)], x.gids[uint32(h.Gid)] = true, true
	}
	e := tsstorage.Entry{Type: tsstorage.FileType, Size: h.Size}
	e.SetName(h.Name)
	content := &summed{r: tr}
	if err := x.make(h, content); err != nil {
		return err
	}
	if h.Size > 0 {
		for { // what was made without its content
			if _, err := content.Read(x.buf); err == io.EOF {
				break
			} else if err != nil {
				return err
			}
		}
		e.Payload = binary.BigEndian.AppendUint64(nil, content.crc)
	}
	if _, err := x.packer.AddEntry(e); err != nil {
		return fmt.Errorf("write tar-split: %w", err)
	}
	return x.segment(tr.RawBytes())
}

// summed is the content of a file, and its checksum.
type summed struct {
	r   io.Reader
	crc uint64
}

func (s *summed) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.crc = crc64.Update(s.crc, tsstorage.CRCTable, p[:n])
	return n, err
}

// make makes the file of an entry, in place of what has its name.
func (x *extractor) make(h *tar.Header, content io.Reader) error {
	name := filepath.Clean(h.Name)
	path := filepath.Join("/", name)
	if parent := filepath.Dir(path); parent != x.parent {
		if _, err := os.Lstat(parent); os.IsNotExist(err) {
			if err := idtools.MkdirAllAndChownNew(parent, 0o777, idtools.IDPair{}); err != nil {
				return err
			}
		}
		x.parent = parent
	}
	fi, err := os.Lstat(path)
	exists := err == nil
	if exists {
		isDir := fi.IsDir()
		switch {
		case isDir && name == ".":
			return nil // the root is as the driver makes it
		case !isDir || h.Typeflag != tar.TypeDir:
			x.parent = ""
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			exists = false
		}
	}
	h.Name = name
	if converter := sarchive.GetWhiteoutConverter(x.options.WhiteoutFormat, x.options.WhiteoutData); converter != nil {
		write, err := converter.ConvertRead(&stdtar.Header{Name: h.Name, Uid: h.Uid, Gid: h.Gid}, path)
		if err != nil || !write {
			return err
		}
	}
	if path == "/" {
		x.ownRoot = true
	}
	if h.Typeflag == tar.TypeDir {
		x.dirs = append(x.dirs, h)
	}
	return x.write(h, path, exists, content)
}

func (x *extractor) write(h *tar.Header, path string, isDir bool, content io.Reader) error {
	mode := h.FileInfo().Mode()
	switch h.Typeflag {
	case tar.TypeDir:
		if !isDir {
			if err := os.Mkdir(path, mode); err != nil {
				return err
			}
		}
	case tar.TypeReg:
		if err := x.file(path, mode, content); err != nil {
			return err
		}
	case tar.TypeBlock, tar.TypeChar, tar.TypeFifo:
		if h.Typeflag != tar.TypeFifo && x.options.InUserNS {
			return nil // nobody may make devices there
		}
		kind := map[byte]uint32{tar.TypeBlock: unix.S_IFBLK, tar.TypeChar: unix.S_IFCHR, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		if err := system.Mknod(path, uint32(h.Mode&0o7777)|kind, system.Mkdev(h.Devmajor, h.Devminor)); err != nil {
			return &os.PathError{Op: "mknod", Path: path, Err: err}
		}
	case tar.TypeLink:
		target := filepath.Join("/", h.Linkname)
		if err := unix.Linkat(unix.AT_FDCWD, target, unix.AT_FDCWD, path, 0); err != nil {
			return &os.LinkError{Op: "link", Old: target, New: path, Err: err}
		}
	case tar.TypeSymlink:
		if err := os.Symlink(h.Linkname, path); err != nil {
			return err
		}
	case tar.TypeXGlobalHeader:
		return nil
	default:
		return fmt.Errorf("entry has type %q", h.Typeflag)
	}

	if err := idtools.SafeLchown(path, h.Uid, h.Gid); err != nil && !x.options.IgnoreChownErrors {
		return err
	}
	// A hard link has the mode and the times of its file, unless that is a symbolic link, which has none.
	linked := true
	if h.Typeflag == tar.TypeLink {
		fi, err := os.Lstat(filepath.Join("/", h.Linkname))
		linked = err == nil && fi.Mode()&os.ModeSymlink == 0
	}
	if h.Typeflag != tar.TypeSymlink && linked { // after the owner, which resets it
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
	}
	if err := x.times(h, path, linked); err != nil {
		return err
	}
	return x.xattrs(h, path)
}

func (x *extractor) file(path string, mode os.FileMode, content io.Reader) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	for {
		n, err := content.Read(x.buf)
		if n > 0 {
			if _, err := f.Write(x.buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (x *extractor) times(h *tar.Header, path string, linked bool) error {
	atime := h.AccessTime
	if atime.Before(h.ModTime) {
		atime = h.ModTime
	}
	if h.Typeflag == tar.TypeSymlink {
		ts := []unix.Timespec{timespec(atime), timespec(h.ModTime)}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "utimensat", Path: path, Err: err}
		}
		return nil
	}
	if !linked {
		return nil
	}
	return system.Chtimes(path, atime, h.ModTime)
}

// timespec is a time for utimensat(2); none is "leave it".
func timespec(t time.Time) unix.Timespec {
	if t.IsZero() {
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	}
	return unix.NsecToTimespec(t.UnixNano())
}

func (x *extractor) xattrs(h *tar.Header, path string) error {
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, sarchive.PaxSchilyXattr)
		if !ok || name == "security.selinux" {
			continue
		}
		err := unix.Lsetxattr(path, name, []byte(value), 0)
		if errors.Is(err, unix.ENOTSUP) || x.options.InUserNS && errors.Is(err, unix.EPERM) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "setxattr " + name, Path: path, Err: err}
		}
	}
	return nil
}
