package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

const maxSeen = 8 // labels that a message names

// A watcher waits until the wanted device is there.
type watcher struct {
	o      Options
	last   bool              // time is over: this look decides
	timer  *time.Timer       // nil if only one look is wanted
	tick   *time.Ticker      // not every change is an event: sysfs sends none, nor does the target of a link
	notify *fsnotify.Watcher // nil: poll only
}

func newWatcher(o Options) *watcher {
	w := &watcher{o: o, last: o.Wait <= 0}
	if w.last {
		return w
	}
	w.timer, w.tick = time.NewTimer(o.Wait), time.NewTicker(poll)
	var err error
	if w.notify, err = fsnotify.NewWatcher(); err != nil {
		o.Note("device is looked for once a second only", "error", err)
		w.notify = nil
	}
	return w
}

func (w *watcher) close() {
	if w.timer != nil {
		w.timer.Stop()
		w.tick.Stop()
	}
	if w.notify != nil {
		w.notify.Close()
	}
}

// wait returns the devices' nodes as soon as there is one, the likeliest first.
func (w *watcher) wait(ctx context.Context) ([]string, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		last := w.last
		w.watch() // before the look: what comes after it is an event
		devices, err := w.o.find(last)
		if err != nil || len(devices) > 0 {
			return devices, err
		}
		if last {
			return nil, w.o.missing()
		}
		w.pause(ctx)
	}
}

// pause returns when there may be something new, and sets w.last when time is over.
func (w *watcher) pause(ctx context.Context) {
	var events chan fsnotify.Event
	var failures chan error
	if w.notify != nil {
		events, failures = w.notify.Events, w.notify.Errors
	}
	select {
	case <-ctx.Done():
	case <-w.timer.C:
		w.last = true
	case <-events:
	case <-failures: // events were lost
	case <-w.tick.C:
	}
}

// watch watches the folder where the device will be named, and the nearest one above that is there: udev makes the
// folder with the first name and removes it with the last. It is called for every look, as either may be another one now.
func (w *watcher) watch() {
	if w.notify == nil || w.last {
		return
	}
	dir := w.o.Dir
	if w.o.Device != "" {
		dir = filepath.Dir(w.o.Device)
	}
	w.notify.Add(dir) // fails if it is not there yet
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		if err := w.notify.Add(parent); err == nil || parent == filepath.Dir(parent) {
			return
		}
	}
}

// find returns the devices' nodes, without duplicates. By label it waits for the name that udev gives one, unless
// this is the last look: before udev is done with a disk, its partition may yet turn out to belong to something else (multipath).
func (o Options) find(last bool) ([]string, error) {
	if o.Device != "" {
		dev, _, err := node(o.Device)
		if dev == "" || err != nil {
			return nil, err
		}
		return []string{dev}, nil
	}
	var devices []string
	var seen []uint64
	add := func(name string) error {
		dev, rdev, err := node(name)
		if err == nil && dev != "" && !slices.Contains(seen, rdev) {
			devices, seen = append(devices, dev), append(seen, rdev)
		}
		return err
	}
	if name := udevName(o.Label); name != "." && name != ".." {
		if err := add(filepath.Join(o.Dir, name)); err != nil {
			return nil, err
		}
	}
	if len(devices) == 0 && !last {
		return nil, nil
	}
	for _, p := range o.partitions() {
		// One that another device is built of (multipath, md) is not to be touched.
		if holders, _ := os.ReadDir(filepath.Join(o.Sys, p.sys, "holders")); p.label == o.Label && len(holders) == 0 {
			if err := add(filepath.Join("/dev", p.dev)); err != nil {
				return nil, err
			}
		}
	}
	return devices, nil
}

// node returns the block device that name is or links to, and its number; nothing if there is none yet.
func node(name string) (dev string, rdev uint64, err error) {
	if dev, err = filepath.EvalSymlinks(name); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", 0, nil
		}
		return "", 0, &Error{name, "", err}
	}
	var st unix.Stat_t
	switch err := unix.Stat(dev, &st); {
	case err == unix.ENOENT:
		return "", 0, nil
	case err != nil:
		return "", 0, &Error{dev, "", err}
	case st.Mode&unix.S_IFMT != unix.S_IFBLK:
		return "", 0, &Error{dev, "", errNotBlock}
	}
	return dev, st.Rdev, nil
}

// A partition is what the kernel says of one.
type partition struct {
	sys, dev, label string
}

// partitions returns the labelled ones in the order of their names. The kernel writes characters beyond ASCII as '!'.
func (o Options) partitions() []partition {
	entries, _ := os.ReadDir(o.Sys) // sorted
	var all []partition
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(o.Sys, e.Name(), "uevent"))
		if err != nil {
			continue // just gone
		}
		p := partition{sys: e.Name()}
		for line := range strings.Lines(string(data)) {
			switch key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "="); key {
			case "DEVNAME":
				p.dev = value
			case "PARTNAME":
				p.label = value
			}
		}
		if p.label != "" && filepath.IsLocal(p.dev) {
			all = append(all, p)
		}
	}
	return all
}

// missing is the error for a device that did not come. It says which labels there are: one may be mistyped.
func (o Options) missing() error {
	waited := ""
	if o.Wait > 0 {
		waited = fmt.Sprintf(" after %v", o.Wait)
	}
	if o.Device != "" {
		return fmt.Errorf("%s is %w%s", o.name(), ErrNoDevice, waited)
	}
	var labels []string
	for _, p := range o.partitions() {
		labels = append(labels, fmt.Sprintf("%q (%s)", p.label, p.dev))
	}
	seen := "no partition has a label"
	if len(labels) > maxSeen {
		labels = append(labels[:maxSeen], "and more")
	}
	if len(labels) > 0 {
		seen = "there are " + strings.Join(labels, ", ")
	}
	return fmt.Errorf("%s is %w%s; %s", o.name(), ErrNoDevice, waited, seen)
}

// udevName is label as udev writes it in the name of a link: everything but ASCII letters, digits, #+-.:=@_ and
// valid characters beyond ASCII as \xHH (encode_devnode_name of systemd, blkid_encode_string of libblkid).
func udevName(label string) string {
	var b strings.Builder
	for i := 0; i < len(label); {
		r, size := utf8.DecodeRuneInString(label[i:])
		switch c := label[i]; {
		case size > 1:
			b.WriteRune(r)
		case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("#+-.:=@_", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
		i += size
	}
	return b.String()
}
