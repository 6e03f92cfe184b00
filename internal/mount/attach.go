package mount

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// covered is what the thread's namespace has the mount on. It is there on every system with systemd (file-hierarchy(7)),
// and nobody else sees that it is covered.
const covered = "/run"

const readOnly = unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC

// mountDetached mounts the block device dev and returns its root. When that and all that was opened through it is closed,
// it is unmounted. rdev is the number that dev must have.
func mountDetached(dev string, rdev uint64, fsType, options string) (root *os.Root, err error) {
	err = apart(func() error {
		if err := retry(func() error { return unix.Mount(dev, covered, fsType, readOnly, options) }); err != nil {
			return explain(err, fsType)
		}
		root, err = takeRoot(rdev)
		return err
	})
	return root, err
}

// explain adds to an error of mount(2) what the error itself does not say.
func explain(err error, fsType string) error {
	switch err {
	case unix.ENODEV:
		return fmt.Errorf("this kernel cannot mount %s: %w", fsType, err)
	case unix.EINVAL, unix.EUCLEAN, unix.EBADMSG, unix.EIO:
		return fmt.Errorf("%w (the kernel log says why)", err)
	}
	return err
}

// bindDetached returns a read-only root of a device that is mounted in this mount namespace, and where it is. The error
// is EBUSY if it is not.
func bindDetached(rdev uint64) (root *os.Root, at string, err error) {
	err = apart(func() error {
		mounts, err := mountsOf("/proc/thread-self/mountinfo", rdev)
		if err != nil {
			return fmt.Errorf("look for its mount: %w", err)
		}
		for _, m := range mounts {
			if m.root != "/" || unix.Mount(m.point, covered, "", unix.MS_BIND, "") != nil ||
				unix.Mount("", covered, "", unix.MS_BIND|unix.MS_REMOUNT|readOnly, "") != nil {
				continue
			}
			// Fails if another mount covers this one.
			if r, err := takeRoot(rdev); err == nil {
				root, at = r, m.point
				return nil
			}
		}
		return unix.EBUSY
	})
	return root, at, err
}

// takeRoot opens what is mounted, which must be of the device rdev, and takes it out of the namespace.
func takeRoot(rdev uint64) (*os.Root, error) {
	// The root that is opened keeps the mount.
	defer unix.Unmount(covered, unix.MNT_DETACH)
	root, err := os.OpenRoot(covered)
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	var st unix.Stat_t
	if err = unix.Stat(covered, &st); err == nil && st.Dev != rdev {
		err = fmt.Errorf("it is of device %s", number(st.Dev))
	}
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("open root: %w", err)
	}
	return root, nil
}

// number is a device's number as the kernel writes it.
func number(rdev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)) }

// apart runs f on a thread of its own in a mount namespace of its own. Both end with f, and with the namespace what f
// mounted; only what f opened stays.
func apart(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end. Occupy it while another one does the work.
			done <- apart(f)
			runtime.UnlockOSThread()
			return
		}
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			done <- fmt.Errorf("unshare mount namespace: %w", err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			done <- fmt.Errorf("make mounts private: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// A mounted is one line of mountinfo (proc_pid_mountinfo(5)).
type mounted struct {
	root, point string
}

// mountsOf returns the mounts of the device rdev that the mountinfo file names.
func mountsOf(file string, rdev uint64) ([]mounted, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []mounted
	for s := bufio.NewScanner(f); ; {
		if !s.Scan() {
			return found, s.Err()
		}
		if fields := strings.Fields(s.Text()); len(fields) > 4 && fields[2] == number(rdev) {
			found = append(found, mounted{unescape(fields[3]), unescape(fields[4])})
		}
	}
}

// unescape undoes mountinfo's \ooo for space, tab, newline and backslash.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
