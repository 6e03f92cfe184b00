package storetest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// A Node is all that can be seen of one file.
type Node struct {
	Mode   uint32 // with the type
	UID    uint32
	GID    uint32
	Size   int64  // of a regular file
	Hash   string // of a regular file's content
	Link   string // target of a symbolic link
	Same   string // the first path of the same file: hard links
	Device uint64 // of a device
	Xattrs string // name=value, in the order of the names; without SELinux's, which is the machine's
	MTime  unix.Timespec
}

// A Tree is a folder and what is in it by path; the folder itself is ".".
type Tree map[string]Node

// ReadTree reads a folder. Nothing in it is followed.
func ReadTree(root string) (Tree, error) {
	t := Tree{}
	type inode struct{ dev, ino uint64 }
	first := map[inode]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err == unix.ENOENT {
			t[name] = Node{} // overlay lists a whiteout of nothing, but does not show it
			return nil
		} else if err != nil {
			return fmt.Errorf("stat %s: %w", path, err)
		}
		n := Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, MTime: st.Mtim, Same: name}
		if !n.folder() {
			id := inode{uint64(st.Dev), st.Ino}
			if first[id] == "" {
				first[id] = name
			}
			n.Same = first[id]
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			n.Size = st.Size
			if n.Hash, err = hashFile(path); err != nil {
				return err
			}
		case unix.S_IFLNK:
			if n.Link, err = os.Readlink(path); err != nil {
				return err
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			n.Device = uint64(st.Rdev)
		}
		if n.Xattrs, err = xattrs(path); err != nil {
			return err
		}
		t[name] = n
		return nil
	})
	return t, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (string, error) {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("list attributes of %s: %w", path, err)
	}
	var all []string
	for _, name := range strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "security.selinux" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", fmt.Errorf("read attribute %s of %s: %w", name, path, err)
		}
		all = append(all, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(all)
	return strings.Join(all, " "), nil
}

// resolve follows the symbolic links among the folders of a path, as extracting it into the tree did.
func (t Tree) resolve(path string) string {
	dir, todo := ".", strings.Split(path, "/")
	for links := 0; len(todo) > 0 && links < 40; {
		next := filepath.Join(dir, todo[0])
		todo = todo[1:]
		if n, ok := t[next]; ok && n.Link != "" && len(todo) > 0 {
			links++
			todo = append(strings.Split(filepath.Clean(n.Link), "/"), todo...)
			if strings.HasPrefix(n.Link, "/") {
				dir = "."
			}
			continue
		}
		dir = strings.TrimPrefix(filepath.Join("/", next), "/")
		if dir == "" {
			dir = "."
		}
	}
	return dir
}

func (n Node) folder() bool { return n.Mode&unix.S_IFMT == unix.S_IFDIR }

// whiteout reports whether a file of a layer only says that it is gone (overlayfs.rst).
func (n Node) whiteout() bool { return n.Mode&unix.S_IFMT == unix.S_IFCHR && n.Device == 0 }

// Diff says, a line each, how two trees differ. The time of a folder counts where timed says so, and never that
// of the tree itself, which no layer decides, or of a whiteout, which has none in the layer.
func (t Tree) Diff(other Tree, timed func(path string) bool) (lines []string) {
	for path := range t {
		if _, ok := other[path]; !ok {
			lines = append(lines, fmt.Sprintf("%s: is missing", path))
		}
	}
	for path, b := range other {
		a, ok := t[path]
		if !ok {
			lines = append(lines, fmt.Sprintf("%s: should not be there", path))
			continue
		}
		if path == "." || a.folder() && !timed(path) || a.whiteout() {
			a.MTime, b.MTime = unix.Timespec{}, unix.Timespec{}
		}
		if a == b {
			continue
		}
		line := path + ":"
		for _, f := range []struct {
			name string
			a, b any
		}{
			{"mode", fmt.Sprintf("%#o", a.Mode), fmt.Sprintf("%#o", b.Mode)}, {"uid", a.UID, b.UID}, {"gid", a.GID, b.GID},
			{"size", a.Size, b.Size}, {"content", a.Hash, b.Hash}, {"target", a.Link, b.Link}, {"same file as", a.Same, b.Same},
			{"device", fmt.Sprintf("%#x", a.Device), fmt.Sprintf("%#x", b.Device)}, {"xattrs", a.Xattrs, b.Xattrs}, {"mtime", a.MTime, b.MTime},
		} {
			if f.a != f.b {
				line += fmt.Sprintf(" %s is %v, want %v;", f.name, f.b, f.a)
			}
		}
		lines = append(lines, strings.TrimSuffix(line, ";"))
	}
	sort.Strings(lines)
	return lines
}
