package storage

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs f on an operating-system thread of its own, which setup may
// change beyond repair: the thread ends with f.
func onThread(setup, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end and lends its root and mounts to
			// /proc/self. Occupy it while another one does the work.
			done <- onThread(setup, f)
			runtime.UnlockOSThread()
			return
		}
		if err := setup(); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// inRoot runs f with dir as its root directory: whatever path f opens, and
// whatever symbolic link it meets on the way, it stays inside (chroot(2)).
// What f starts as goroutines is outside.
func inRoot(dir *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare root directory: %w", err)
		}
		if err := unix.Fchdir(int(dir.Fd())); err != nil {
			return fmt.Errorf("enter %s: %w", dir.Name(), err)
		}
		if err := unix.Chroot("."); err != nil {
			return fmt.Errorf("change root to %s: %w", dir.Name(), err)
		}
		return nil
	}, f)
}

// withoutMount runs f where nothing is mounted on path. Podman leaves the
// overlay driver's home mounted on itself, and nothing can be renamed from
// outside of a mount into it.
func withoutMount(path string, f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		for range 64 {
			// EINVAL: not a mount point (umount(2)).
			if err := unix.Unmount(path, unix.MNT_DETACH); err == unix.EINVAL {
				return nil
			} else if err != nil {
				return fmt.Errorf("unmount %s: %w", path, err)
			}
		}
		return fmt.Errorf("unmount %s: it is mounted again and again", path)
	}, f)
}
