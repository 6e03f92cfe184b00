package mount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const loopTries = 32 // others may take the free loop device first

// mountLoop mounts the ext4 on the block device dev through a loop device that cannot write, and returns its root and
// the loop device's number. The loop device holds dev exclusively, and goes away with the mount (loop(4)).
//
// Ext4 itself writes to a device that is not read-only, whatever the options: it clears the orphan list when mounting
// and records damage in the superblock. On one that is it does neither. errors=continue: what the
// file system would have done with damage, panic perhaps, is not what a booting node needs.
func mountLoop(dev string) (*os.Root, uint64, error) {
	loop, rdev, err := openLoop(dev)
	if err != nil {
		return nil, 0, err
	}
	// The mount keeps it. Without one this detaches it.
	defer unix.Close(loop.fd)
	root, err := mountDetached(loop.name, rdev, "ext4", "noload,errors=continue")
	return root, rdev, err
}

type loopDevice struct {
	fd   int
	name string
}

func openLoop(dev string) (loop loopDevice, rdev uint64, err error) {
	back, err := unix.Open(dev, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return loop, 0, fmt.Errorf("open exclusively: %w", err)
	}
	defer unix.Close(back)
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return loop, 0, fmt.Errorf("open /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	config := unix.LoopConfig{Fd: uint32(back)}
	// Direct I/O: the pages are cached once. Where the device cannot do it, the kernel goes without.
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(config.Info.File_name[:len(config.Info.File_name)-1], dev)
	for range loopTries {
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return loop, 0, fmt.Errorf("find a free loop device: %w", err)
		}
		loop.name = fmt.Sprintf("/dev/loop%d", n)
		if loop.fd, err = unix.Open(loop.name, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return loop, 0, fmt.Errorf("open %s: %w", loop.name, err)
		}
		var st unix.Stat_t
		err = unix.IoctlLoopConfigure(loop.fd, &config) // Linux 5.8
		if err == nil {
			err = unix.Fstat(loop.fd, &st)
		}
		if err == nil {
			return loop, st.Rdev, nil
		}
		unix.Close(loop.fd)
		if err != unix.EBUSY {
			return loop, 0, fmt.Errorf("attach %s: %w", loop.name, err)
		}
	}
	return loop, 0, errors.New("others take every free loop device")
}
