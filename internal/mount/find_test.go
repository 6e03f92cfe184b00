package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestUdevName(t *testing.T) {
	for label, want := range map[string]string{
		"data":               "data",
		"my data":            `my\x20data`,
		"a/b":                `a\x2fb`,
		`a\b`:                `a\x5cb`,
		"#+-.:=@_":           "#+-.:=@_",
		"(x)~!":              `\x28x\x29\x7e\x21`,
		"größe":              "größe",
		"数据":                 "数据",
		"\xff":               `\xff`,
		"a\tb\x7f":           `a\x09b\x7f`,
		"var-lib-containers": "var-lib-containers",
	} {
		if got := udevName(label); got != want {
			t.Errorf("%q: %q, want %q", label, got, want)
		}
	}
}

// TestAppears has the device appear in different ways while it is waited for. Only events can end the waiting: nobody looks once a second.
func TestAppears(t *testing.T) {
	need(t)
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev := attachFile(t, file)
	for _, tt := range []struct {
		name    string
		before  func(t *testing.T, m machine)
		appears func(t *testing.T, m machine)
		options func(o *Options)
	}{
		{name: "link"},
		{
			name:   "folder, then link",
			before: func(t *testing.T, m machine) { remove(t, m.dir) },
			appears: func(t *testing.T, m machine) {
				mkdir(t, m.dir)
				time.Sleep(20 * time.Millisecond)
				m.udev(t, dev, "data")
			},
		},
		{
			name:    "folder and link at once",
			before:  func(t *testing.T, m machine) { remove(t, m.dir) },
			appears: func(t *testing.T, m machine) { mkdir(t, m.dir); m.udev(t, dev, "data") },
		},
		{
			name:    "folder of the folder",
			before:  func(t *testing.T, m machine) { remove(t, m.dir); remove(t, filepath.Dir(m.dir)) },
			appears: func(t *testing.T, m machine) { mkdir(t, m.dir); m.udev(t, dev, "data") },
		},
		{
			name:   "folder goes and comes again",
			before: func(t *testing.T, m machine) { m.udev(t, "/dev/null", "other") },
			appears: func(t *testing.T, m machine) {
				remove(t, filepath.Join(m.dir, "other"))
				remove(t, m.dir)
				mkdir(t, m.dir)
				m.udev(t, dev, "data")
			},
		},
		{
			name:    "other links before",
			appears: func(t *testing.T, m machine) { m.udev(t, dev, "other"); m.udev(t, dev, "data") },
		},
		{
			name:    "label that udev encodes",
			appears: func(t *testing.T, m machine) { m.udev(t, dev, `my\x20data`) },
			options: func(o *Options) { o.Label = "my data" },
		},
		{
			name: "link to nowhere before",
			before: func(t *testing.T, m machine) {
				m.udev(t, filepath.Join(m.dir, "nowhere"), "data")
			},
		},
		{
			name:    "device",
			options: func(o *Options) { o.Device = filepath.Join(o.Dir, "data") },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			leaks(t)
			m := newMachine(t)
			o, _ := m.options(t)
			o.Label = "data"
			o.Wait = 30 * time.Second
			if tt.options != nil {
				tt.options(&o)
			}
			if tt.before != nil {
				tt.before(t, m)
			}
			if tt.appears == nil {
				tt.appears = func(t *testing.T, m machine) { m.udev(t, dev, "data") }
			}
			w := newWatcher(o)
			defer w.close()
			w.tick.Stop()
			start := make(chan time.Time, 1)
			go func() {
				time.Sleep(100 * time.Millisecond)
				start <- time.Now()
				tt.appears(t, m)
			}()
			devices, err := w.wait(t.Context())
			if len(devices) != 1 || devices[0] != dev || err != nil || w.last {
				t.Errorf("got %v, %v, at the end of the time: %v", devices, err, w.last)
			}
			t.Logf("seen %v after it appeared", time.Since(<-start))
		})
	}
}

func remove(t *testing.T, name string) {
	if err := os.Remove(name); err != nil {
		t.Error(err)
	}
}

func mkdir(t *testing.T, name string) {
	if err := os.MkdirAll(name, 0o755); err != nil {
		t.Error(err)
	}
}

func TestAppearsLate(t *testing.T) {
	dev := attachFile(t, image(t, "xfs", clean))
	leaks(t)
	m := newMachine(t)
	o, _ := m.options(t)
	o.Wait = 30 * time.Second
	go func() {
		time.Sleep(200 * time.Millisecond)
		m.udev(t, dev, "data")
	}()
	closeMount(t, open(t, o))
}

// TestLastLook has a device that nothing announces, and that the kernel alone knows: the last look finds it.
func TestLastLook(t *testing.T) {
	dev := attachFile(t, image(t, "xfs", clean))
	m := newMachine(t)
	m.kernel(t, dev, "data")
	o, _ := m.options(t)
	o.Wait = 300 * time.Millisecond
	start := time.Now()
	closeMount(t, open(t, o))
	if d := time.Since(start); d < o.Wait {
		t.Errorf("did not wait for udev: %v", d)
	}
}

func TestNoDevice(t *testing.T) {
	for _, wait := range []time.Duration{0, 200 * time.Millisecond} {
		leaks(t)
		m := newMachine(t)
		m.kernel(t, "/dev/nosuch1", "boot")
		m.kernel(t, "/dev/nosuch2", "root")
		m.kernel(t, "/dev/nosuch3", "data")
		o, notes := m.options(t)
		o.Wait = wait
		start := time.Now()
		_, err := Open(t.Context(), o)
		is(t, err, ErrNoDevice)
		if want := `partition labelled "data" is not there`; err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), `"boot" (nosuch1)`) {
			t.Errorf("error is %v", err)
		}
		if d := time.Since(start); d < wait || d > wait+10*time.Second {
			t.Errorf("waited %v, not %v", d, wait)
		}
		notes.has(t)

		o.Device = filepath.Join(t.TempDir(), "sda5")
		_, err = Open(t.Context(), o)
		is(t, err, ErrNoDevice)
	}
	m := newMachine(t)
	o, _ := m.options(t)
	for _, o.Label = range []string{".", ".."} {
		_, err := Open(t.Context(), o)
		is(t, err, ErrNoDevice)
	}
}

func TestCancel(t *testing.T) {
	leaks(t)
	m := newMachine(t)
	o, _ := m.options(t)
	o.Wait = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := Open(ctx, o); err != context.Canceled {
		t.Errorf("error is %v", err)
	}
	if _, err := Open(ctx, o); err != context.Canceled {
		t.Errorf("error is %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, o); err != context.DeadlineExceeded {
		t.Errorf("error is %v", err)
	}
}

// TestVanished has a node behind which there is nothing, as while a partition table is read again.
func TestVanished(t *testing.T) {
	dev := attachFile(t, image(t, "xfs", clean))
	leaks(t)
	node := filepath.Join(t.TempDir(), "node")
	const unused = 241 // a major number for local use (admin-guide/devices)
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(unused, 0))); err != nil {
		t.Fatal(err)
	}
	m := newMachine(t)
	m.udev(t, node, "data")
	o, _ := m.options(t)
	o.Wait = 200 * time.Millisecond
	start := time.Now()
	_, err := Open(t.Context(), o)
	is(t, err, unix.ENXIO)
	if d := time.Since(start); d < o.Wait {
		t.Errorf("did not wait: %v", d)
	}
	o.Wait = 30 * time.Second
	go func() {
		time.Sleep(100 * time.Millisecond)
		m.udev(t, dev, "data")
	}()
	closeMount(t, open(t, o))
}

// TestCancelMounting ends the context while the device is being mounted: it is released, at once or a little later.
func TestCancelMounting(t *testing.T) {
	dev := attachFile(t, image(t, "xfs", clean))
	leaks(t)
	for i := range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*2*time.Millisecond)
		m, err := Open(ctx, Options{Device: dev})
		if err == nil {
			err = m.Close()
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()
		t.Log(i, err)
		if err := exclusive(dev); err != nil {
			t.Error(err)
		}
	}
}
