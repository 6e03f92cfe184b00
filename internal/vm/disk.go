package vm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A Partition is the last one of a disk, where the factory puts its archives. Before it is one that nobody uses.
type Partition struct {
	Label string                 // in the partition table
	Size  int64                  // of the partition; 0: 320 MiB, of which little is written
	Fill  func(dir string) error // called with the mounted file system, an XFS; nil: there is none
	// Dirty leaves the file system as a power cut does: what Fill wrote is in place, and the log holds something more.
	Dirty bool
	// Damage is called with the file system's image.
	Damage func(image *os.File) error
}

// dirtyFile is what stands in the log only.
const dirtyFile = "written-at-the-last-moment"

// NewDisk makes a disk image with a partition table.
func NewDisk(path string, p Partition) error {
	if err := p.write(path); err != nil {
		return fmt.Errorf("make disk %s: %w", filepath.Base(path), err)
	}
	return nil
}

func (p Partition) write(path string) error {
	const mib = 1 << 20
	size := p.Size
	if size == 0 {
		size = 320 * mib
	}
	if err := newFile(path, size+34*mib); err != nil {
		return err
	}
	if err := run("sgdisk", "-o", "-n", "1:2048:+16M", "-c", "1:boot", "-n", "2:"+strconv.FormatInt(34*2048-16*2048, 10)+":+"+strconv.FormatInt(size>>10, 10)+"K",
		"-c", "2:"+p.Label, "-t", "2:8300", path); err != nil {
		return err
	}
	start, err := partitionStart(path)
	if err != nil {
		return err
	}
	image := path + ".part"
	defer os.Remove(image)
	if err := newFile(image, size); err != nil {
		return err
	}
	if p.Fill != nil {
		if err := p.fill(image); err != nil {
			return err
		}
	}
	if p.Damage != nil {
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(p.Damage(f), f.Close()); err != nil {
			return fmt.Errorf("damage: %w", err)
		}
	}
	return copyAt(path, start, image)
}

func (p Partition) fill(image string) error {
	if err := run("mkfs.xfs", "-q", "-f", "-L", "data", image); err != nil {
		return err
	}
	if err := Edit(image, p.Fill); err != nil {
		return err
	}
	if !p.Dirty {
		return nil
	}
	return Edit(image, func(dir string) error {
		if err := os.WriteFile(filepath.Join(dir, dirtyFile), []byte("x"), 0o644); err != nil {
			return err
		}
		return run("xfs_io", "-x", "-c", "shutdown -f", dir) // the log is written, what it speaks of is not
	})
}

func newFile(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// partitionStart is where the last partition of a disk image begins, in bytes.
func partitionStart(path string) (int64, error) {
	out, err := output("sgdisk", "-i", "2", path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "First sector: "); ok {
			sector, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return sector * 512, err
		}
	}
	return 0, fmt.Errorf("find partition of %s: sgdisk says %q", path, out)
}

// copyAt copies a file into another one, but for what is zero.
func copyAt(path string, at int64, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	block, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(in, block)
		if n > 0 && !bytes.Equal(block[:n], zero[:n]) {
			if _, err := out.WriteAt(block[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return out.Close()
		default:
			return err
		}
	}
}

// Hash is the SHA-256 of a whole disk.
func Hash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("hash %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
