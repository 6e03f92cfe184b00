package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultLabel = "data"
	defaultDir   = "/dev/disk/by-partlabel"
	defaultSys   = "/sys/class/block"

	poll      = time.Second            // between two looks when nothing says that there is something new
	grace     = time.Second            // that a cancelled attempt has to end in, before Open leaves it alone
	releaseIn = 2 * time.Second        // how long Close waits for the kernel and for other users
	busyIn    = time.Second            // how long a device may be busy before that is an error
	busyEvery = 20 * time.Millisecond  // between two attempts meanwhile
	closeMax  = 100 * time.Millisecond // the longest pause between two of Close's looks
)

// Options say which device is meant, and how long to wait for it.
type Options struct {
	Label  string        // of the GPT partition; "data" if it and Device are empty
	Device string        // a block device's node, instead of Label
	Wait   time.Duration // for the device to appear; 0: only look

	// Accept says of each of several partitions with the label whether it is the one. Nil accepts the first.
	// It is not asked when there is only one. What it opens it must close.
	Accept func(root *os.Root) bool

	Dir string // where udev names partitions by label; /dev/disk/by-partlabel if empty
	Sys string // where the kernel lists block devices; /sys/class/block if empty

	Note func(msg string, args ...any) // is told what an operator should know, like slog.Info; may be nil
}

func (o Options) withDefaults() Options {
	if o.Label == "" && o.Device == "" {
		o.Label = defaultLabel
	}
	if o.Dir == "" {
		o.Dir = defaultDir
	}
	if o.Sys == "" {
		o.Sys = defaultSys
	}
	if o.Note == nil {
		o.Note = func(string, ...any) {}
	}
	return o
}

// name is the wanted device for a message.
func (o Options) name() string {
	if o.Device != "" {
		return "device " + o.Device
	}
	return fmt.Sprintf("partition labelled %q", o.Label)
}

var (
	// ErrNoDevice is why Open fails when the device did not appear within Options.Wait.
	ErrNoDevice = errors.New("not there")
	// ErrNoFileSystem is an Error's reason when the device has no file system of a kind that is mounted.
	ErrNoFileSystem = errors.New("no XFS or ext4 file system on it")
)

// An Error says why a device that is there cannot be used. Its reason is ErrNoFileSystem, or an error of the system:
// EUCLEAN, EBADMSG, EINVAL or EIO for damage, or for a format that this kernel is too old for (its log says which); EBUSY if another holds it.
type Error struct {
	Device string // its node
	FSType string // "xfs" or "ext4"; empty if it has none of them
	Err    error
}

func (e *Error) Error() string {
	if e.FSType == "" {
		return fmt.Sprintf("use %s: %v", e.Device, e.Err)
	}
	return fmt.Sprintf("mount %s (%s): %v", e.Device, e.FSType, e.Err)
}

// Unwrap returns the reason.
func (e *Error) Unwrap() error { return e.Err }

// A Mount is a mounted device.
type Mount struct {
	Root   *os.Root // nothing can be written through it, and no device node in it be opened; its Name says nothing
	Device string   // its node, such as /dev/sda5
	FSType string   // "xfs" or "ext4"
	Dirty  bool     // it was not unmounted cleanly: what was written last may be missing or damaged
	Shared string   // where another has it mounted, if that mount is read: it can change meanwhile, and Close cannot free it

	dev  uint64 // the file system's number, that of the loop device if it is mounted through one
	once sync.Once
	err  error
}

// Open waits for the device, mounts it read-only, nodev, nosuid and noexec, and returns it. Nothing is ever written to
// the device. Of several partitions with the label the first that o.Accept likes is returned: the one that
// o.Dir names, then the others by name. If it likes none, the first that can be mounted is.
//
// The error is ErrNoDevice if there was none in time, ctx.Err() if that ended it, and has an Error for each
// device that was there and could not be mounted.
func Open(ctx context.Context, o Options) (*Mount, error) {
	o = o.withDefaults()
	w := newWatcher(o)
	defer w.close()
	for {
		devices, err := w.wait(ctx)
		if err != nil {
			return nil, err
		}
		m, err := choose(ctx, o, devices)
		if err == nil || w.last || !errors.Is(err, errVanished) {
			return m, err
		}
		w.pause(ctx) // the partition table was just being read again, say
	}
}

func choose(ctx context.Context, o Options, devices []string) (*Mount, error) {
	var first *Mount // that can be mounted
	var bad []error
	for _, dev := range devices {
		m, err := attach(ctx, dev)
		if err == nil && len(devices) > 1 && o.Accept != nil && !o.Accept(m.Root) {
			if first == nil {
				first = m
			} else {
				o.release(m)
			}
			continue
		}
		if err != nil && ctx.Err() != nil {
			first.discard()
			return nil, ctx.Err()
		}
		if err != nil {
			bad = append(bad, err)
			continue
		}
		if first != nil {
			o.release(first)
		}
		return chosen(o, m, devices, bad), nil
	}
	if first != nil {
		return chosen(o, first, devices, bad), nil
	}
	return nil, errors.Join(bad...)
}

// release closes a partition that is not the one.
func (o Options) release(m *Mount) {
	if err := m.Close(); err != nil {
		o.Note("partition that is not used cannot be released", "device", m.Device, "error", err)
	}
}

// chosen notes what is to be known about m and the devices that were left for it.
func chosen(o Options, m *Mount, devices []string, bad []error) *Mount {
	for _, err := range bad {
		o.Note("partition with the label cannot be mounted", "label", o.Label, "error", err)
	}
	if len(devices) > 1 {
		left := slices.DeleteFunc(slices.Clone(devices), func(d string) bool { return d == m.Device })
		o.Note("several partitions have the label, one is used", "label", o.Label, "device", m.Device, "left", left)
	}
	if m.Dirty {
		o.Note("file system was not unmounted cleanly, what was written last may be missing", "device", m.Device, "type", m.FSType)
	}
	if m.Shared != "" {
		o.Note("file system is mounted elsewhere too, what is read can change", "device", m.Device, "at", m.Shared)
	}
	return m
}

// attach mounts dev. A disk that does not answer cannot be given up, so when ctx ends, the attempt is left to itself.
func attach(ctx context.Context, dev string) (*Mount, error) {
	type result struct {
		m   *Mount
		err error
	}
	done := make(chan result, 1)
	go func() {
		m, err := mountDevice(ctx, dev)
		done <- result{m, err}
	}()
	select {
	case r := <-done:
		return r.m, r.err
	case <-ctx.Done():
	}
	ended := make(chan struct{})
	go func() {
		(<-done).m.discard()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(grace):
	}
	return nil, ctx.Err()
}

func mountDevice(ctx context.Context, dev string) (*Mount, error) {
	p, err := probe(dev)
	if err != nil {
		return nil, &Error{dev, p.fsType, err}
	}
	m := &Mount{Device: dev, FSType: p.fsType}
	for start := time.Now(); ; time.Sleep(busyEvery) {
		m.dev = p.rdev
		if p.fsType == "xfs" {
			// nouuid: a copy of the file system may be mounted too. None of them is written to.
			m.Root, err = mountDetached(dev, p.rdev, "xfs", "norecovery,nouuid")
		} else {
			m.Root, m.dev, err = mountLoop(dev)
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		// Mounted elsewhere, or claimed by another program; perhaps by one that is just ending.
		m.dev = p.rdev
		if m.Root, m.Shared, err = bindDetached(p.rdev); !errors.Is(err, unix.EBUSY) {
			break
		}
		if time.Since(start) > busyIn || ctx.Err() != nil {
			err = fmt.Errorf("%w: %s", unix.EBUSY, users(dev, p.rdev, p.rdev))
			break
		}
	}
	if err != nil {
		return nil, &Error{dev, p.fsType, err}
	}
	m.Dirty = p.dirty && m.Shared == "" // while it is written to, it is never clean
	return m, nil
}

// discard closes a mount that nobody has seen.
func (m *Mount) discard() {
	if m != nil {
		m.Root.Close()
	}
}

// Close unmounts the device. When it returns nil, the device can be opened with O_EXCL (open(2)), as an installer does.
// It waits up to two seconds for that; the error says who may still hold the device: a file of this process that was
// not closed, another mount, another program. Calling it again returns the same.
func (m *Mount) Close() error {
	m.once.Do(func() { m.err = m.release() })
	return m.err
}

func (m *Mount) release() error {
	if err := m.Root.Close(); err != nil {
		return fmt.Errorf("release %s: %w", m.Device, err)
	}
	pause := time.Millisecond
	for start := time.Now(); ; time.Sleep(pause) {
		fd, err := unix.Open(m.Device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			unix.Close(fd)
			return nil
		}
		if err != unix.EBUSY && err != unix.EINTR {
			return nil // it is gone
		}
		if time.Since(start) > releaseIn {
			var st unix.Stat_t
			if err := unix.Stat(m.Device, &st); err != nil {
				return nil
			}
			return fmt.Errorf("release %s: %w after %v: %s", m.Device, unix.EBUSY, releaseIn, users(m.Device, st.Rdev, m.dev))
		}
		pause = min(2*pause, closeMax)
	}
}
