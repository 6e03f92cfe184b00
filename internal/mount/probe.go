package mount

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// What is read of the file systems, from their on-disk formats: Documentation/filesystems/ext4 and fs/xfs/libxfs/xfs_format.h,
// xfs_log_format.h of the kernel.
const (
	ext4Super    = 0x400 // offset, in bytes
	ext4Magic    = 0xef53
	ext4Valid    = 1 // in s_state
	ext4Errors   = 2
	ext4Recover  = 4 // in s_feature_incompat
	xfsMagic     = "XFSB"
	xfsMaxBlock  = 64 << 10 // bytes
	xfsMaxAG     = 1 << 40  // bytes of an allocation group
	xfsMaxAGs    = 1 << 20  // more than there are, but no overflow
	xlogMagic    = 0xfeedbabe
	xlogBlock    = 512       // bytes
	xlogRecord   = 256 << 10 // bytes, the longest record
	xlogHeader   = 32 << 10  // bytes that one header block stands for
	xlogUnmount  = 0x20      // in an operation's flags: the file system was unmounted after it
	xlogMaxBytes = 2 << 30
)

// A probed is what a device's first bytes say.
type probed struct {
	rdev   uint64
	fsType string // "xfs", "ext4", or empty
	dirty  bool
}

// probe looks at the block device dev.
func probe(dev string) (p probed, err error) {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == unix.ENXIO || err == unix.ENOENT || err == unix.ENODEV {
		return p, fmt.Errorf("%w: %w", errVanished, err)
	} else if err != nil {
		return p, fmt.Errorf("open: %w", err)
	}
	f := os.NewFile(uintptr(fd), dev)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return p, fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return p, errNotBlock
	}
	p.rdev = st.Rdev
	super := make([]byte, 2*ext4Super)
	if _, err := f.ReadAt(super, 0); err == io.EOF {
		return p, fmt.Errorf("%w: it is too small", ErrNoFileSystem)
	} else if err != nil {
		return p, fmt.Errorf("read superblock: %w", errors.Unwrap(err))
	}
	ext := super[ext4Super:]
	le := binary.LittleEndian
	switch {
	case string(super[:4]) == xfsMagic:
		p.fsType = "xfs"
		p.dirty = xfsDirty(f, super)
	case le.Uint16(ext[0x38:]) == ext4Magic:
		p.fsType = "ext4"
		state := le.Uint16(ext[0x3a:])
		p.dirty = state&ext4Valid == 0 || state&ext4Errors != 0 || le.Uint32(ext[0x60:])&ext4Recover != 0
	default:
		return p, ErrNoFileSystem
	}
	return p, nil
}

var (
	errNotBlock = errors.New("it is not a block device")
	errVanished = errors.New("it has a name but does not answer")
)

// xfsLog returns where the log of the XFS with this superblock is, in bytes, and how many blocks of 512 bytes it has; 0 if it
// is on another device or cannot be.
func xfsLog(super []byte) (offset int64, n int) {
	be := binary.BigEndian
	blockSize, agBlocks, agLog := int64(be.Uint32(super[4:])), int64(be.Uint32(super[84:])), super[124]
	start, blocks := be.Uint64(super[48:]), int64(be.Uint32(super[96:])) // in file system blocks
	if start == 0 || agLog > 31 || start>>agLog > xfsMaxAGs || blockSize < xlogBlock || blockSize > xfsMaxBlock ||
		agBlocks*blockSize > xfsMaxAG || blocks*blockSize > xlogMaxBytes {
		return 0, 0
	}
	return (int64(start>>agLog)*agBlocks + int64(start&(1<<agLog-1))) * blockSize, int(blocks * blockSize / xlogBlock)
}

// xfsDirty reports whether the XFS was not unmounted cleanly: then the last record of its log is not the one that is written
// at the end. Like the kernel (xlog_find_head, xlog_check_unmount_rec) it finds the log's end by the number of the
// round that each block carries, but believes what it reads: it is for a message only. A log that cannot be read is not dirty.
func xfsDirty(r io.ReaderAt, super []byte) bool {
	offset, n := xfsLog(super)
	if n == 0 {
		return false
	}
	be := binary.BigEndian
	var failed error
	block := make([]byte, xlogBlock)
	read := func(i int) []byte {
		if _, err := r.ReadAt(block, offset+int64((i%n+n)%n)*xlogBlock); err != nil {
			failed = err
			clear(block)
		}
		return block
	}
	round := func(i int) uint32 {
		b := read(i)
		if be.Uint32(b) == xlogMagic {
			return be.Uint32(b[4:])
		}
		return be.Uint32(b)
	}
	first := round(0)
	end := sort.Search(n, func(i int) bool { return round(i) != first }) // n: the log is just full
	for i := end - 1; failed == nil && i >= end-2*xlogRecord/xlogBlock; i-- {
		head := read(i)
		if be.Uint32(head) != xlogMagic {
			continue
		}
		headers := 1
		if size := be.Uint32(head[320:]); be.Uint32(head[8:])&2 != 0 && size > xlogHeader && size <= xlogRecord {
			headers = int(size+xlogHeader-1) / xlogHeader
		}
		length := (int(be.Uint32(head[12:])) + xlogBlock - 1) / xlogBlock
		if be.Uint32(head[40:]) != 1 || i+headers+length != end {
			return true
		}
		return read(i + headers)[9]&xlogUnmount == 0
	}
	return failed == nil
}
