package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containers/image/v5/signature"
	"github.com/containers/image/v5/types"
	"github.com/containers/storage"
	drivers "github.com/containers/storage/drivers"
	sarchive "github.com/containers/storage/pkg/archive"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// stateDir is ours, in the graph root: it dies with the store, and what is
// staged in it can be renamed into the store.
const stateDir = ".precache-agent"

// Options say which store, in podman's words. Zero fields are what storage.conf says
// (containers-storage.conf(5); CONTAINERS_STORAGE_CONF names another one).
type Options struct {
	Root       string   // podman --root
	RunRoot    string   // podman --runroot
	Driver     string   // podman --storage-driver
	DriverOpts []string // podman --storage-opt
	PolicyPath string   // policy.json (containers-policy.json(5)); "": the system's

	// Waiting is told who holds the store, if another agent does.
	Waiting func(holder string)
}

// A Store is an opened store. It may be used by any number of goroutines;
// Commit by one at a time.
type Store struct {
	store  storage.Store
	driver drivers.Driver
	policy *signature.Policy
	sys    *types.SystemContext
	lock   *os.File
	root   *os.File // the graph root: one descriptor, so that Sync is told of every failed write

	graphRoot string
	staging   string
	tmp       string
	boot      string // boot ID: what was staged in another boot may have lost data

	layerIndex *index[storage.Layer]
	imageIndex *index[storage.Image]

	prepared func() error
	tar      *sarchive.TarOptions // how this driver wants its layers extracted; nil: layers in order, through the library

	lib    sync.Mutex // of calls into store: its bookkeeping of locks is not made for several readers at once
	mu     sync.Mutex
	staged map[digest.Digest][]*staged
	broken map[digest.Digest]bool // cannot be copied from a layer of the store
}

// ErrNeedsRoot says that the user may not write the store.
var ErrNeedsRoot = errors.New("the store needs root: run as root, or through podman unshare")

// Open opens the store, waiting for another agent that has it open.
func Open(ctx context.Context, o Options) (_ *Store, err error) {
	if os.Geteuid() != 0 {
		return nil, ErrNeedsRoot
	}
	so, err := storeOptions(o)
	if err != nil {
		return nil, err
	}
	s := &Store{
		graphRoot: so.GraphRoot,
		staging:   filepath.Join(so.GraphRoot, stateDir, "staging"),
		tmp:       filepath.Join(so.GraphRoot, stateDir, "tmp"),
		staged:    map[digest.Digest][]*staged{},
		broken:    map[digest.Digest]bool{},
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	s.sys = &types.SystemContext{SignaturePolicyPath: o.PolicyPath, BigFilesTemporaryDir: s.tmp}
	if s.policy, err = signature.DefaultPolicy(s.sys); err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read boot ID: %w", err)
	}
	s.boot = strings.TrimSpace(string(b))
	if err := os.MkdirAll(filepath.Dir(s.staging), 0o700); err != nil {
		return nil, fmt.Errorf("make state folder: %w", err)
	}
	if s.lock, err = lock(ctx, filepath.Join(filepath.Dir(s.staging), "lock"), o.Waiting); err != nil {
		return nil, err
	}
	if s.store, err = storage.GetStore(so); err != nil {
		return nil, fmt.Errorf("open store %s: %w", so.GraphRoot, err)
	}
	if s.driver, err = s.store.GraphDriver(); err != nil {
		return nil, fmt.Errorf("open driver of %s: %w", so.GraphRoot, err)
	}
	if s.layerIndex, err = newIndex[storage.Layer](s.layers(), "layers"); err != nil {
		return nil, err
	}
	if s.imageIndex, err = newIndex[storage.Image](s.images(), "images"); err != nil {
		return nil, err
	}
	s.prepared = sync.OnceValue(func() error { return s.prepareToWrite(so) })
	return s, nil
}

// prepareToWrite does what only a load needs that has something to load: where
// nothing is missing, nothing is written.
func (s *Store) prepareToWrite(so storage.StoreOptions) (err error) {
	if err := os.RemoveAll(s.tmp); err != nil { // a killed run's
		return fmt.Errorf("remove old temporary files: %w", err)
	}
	for _, dir := range []string{s.staging, s.tmp} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make state folder: %w", err)
		}
	}
	if s.root, err = os.Open(s.graphRoot); err != nil {
		return fmt.Errorf("open graph root: %w", err)
	}
	if s.tar, err = s.tarOptions(so); err != nil {
		return err
	}
	if err := s.label(); err != nil {
		return err
	}
	return s.findStaged()
}

// Close releases the store. Nothing of it is mounted, and what podman has mounted stays.
func (s *Store) Close() error {
	var errs []error
	if s.driver != nil {
		s.store.Free()
		// The library leaves them; 1.49 to 1.58 of it take the first for a layer.
		for _, dir := range []string{filepath.Join(s.home(), "tempdirs"), filepath.Join(s.home(), "staging"), filepath.Join(s.layers(), "tmp")} {
			os.Remove(dir) // only if it is empty
		}
	}
	if s.root != nil {
		errs = append(errs, s.root.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// GraphRoot is where the store is.
func (s *Store) GraphRoot() string { return s.graphRoot }

// Prepare makes the store ready to be written, and reports whether layers can
// be staged, in any order. Otherwise [Store.PutLayer] takes them, in order.
func (s *Store) Prepare(context.Context) (parallel bool, err error) {
	err = s.prepared()
	return s.parallel(), err
}

func (s *Store) parallel() bool { return s.tar != nil }

func (s *Store) home() string   { return filepath.Join(s.graphRoot, s.driver.String()) }
func (s *Store) layers() string { return filepath.Join(s.graphRoot, s.driver.String()+"-layers") }

// storeOptions does with the flags what podman does with its global flags.
func storeOptions(o Options) (storage.StoreOptions, error) {
	so, err := storage.DefaultStoreOptions()
	if err != nil {
		return so, fmt.Errorf("read storage.conf: %w", err)
	}
	if o.Root != "" {
		if so.GraphRoot, err = filepath.Abs(o.Root); err != nil {
			return so, fmt.Errorf("find graph root: %w", err)
		}
	}
	if o.RunRoot != "" {
		if so.RunRoot, err = filepath.Abs(o.RunRoot); err != nil {
			return so, fmt.Errorf("find run root: %w", err)
		}
	}
	if o.Driver != "" {
		so.GraphDriverName, so.GraphDriverOptions = o.Driver, nil
	}
	if len(o.DriverOpts) > 0 { // they replace those of storage.conf, and an empty one replaces them by none
		so.GraphDriverOptions = slices.DeleteFunc(slices.Clone(o.DriverOpts), func(opt string) bool { return opt == "" })
	}
	if so.GraphDriverName == "" {
		so.GraphDriverName = "overlay"
		for _, name := range []string{"vfs", "btrfs", "zfs"} {
			if _, err := os.Stat(filepath.Join(so.GraphRoot, name+"-images")); err == nil {
				so.GraphDriverName = name
			}
		}
	}
	if so.GraphDriverName == "overlay2" {
		so.GraphDriverName = "overlay"
	}
	if so.GraphDriverName == "overlay" {
		// Without it the driver's home is a mount of its own, and nothing can be renamed into it.
		so.GraphDriverOptions = append(so.GraphDriverOptions, "overlay.skip_mount_home=true")
	}
	return so, nil
}

// tarOptions asks the driver how it wants a layer extracted. Nil: not at all.
func (s *Store) tarOptions(so storage.StoreOptions) (*sarchive.TarOptions, error) {
	if s.driver.String() != "overlay" || so.ImageStore != "" || len(so.UIDMap)+len(so.GIDMap) > 0 {
		return nil, nil
	}
	if _, ok := s.driver.(drivers.DriverWithDiffer); !ok {
		return nil, nil
	}
	// What is staged is renamed into the driver's home, which may be a mount
	// of itself, but not of another file system.
	var root, home unix.Stat_t
	if err := errors.Join(unix.Stat(s.graphRoot, &root), unix.Stat(s.home(), &home)); err != nil || root.Dev != home.Dev {
		return nil, err
	}
	var p probe
	out, err := s.store.PrepareStagedLayer(nil, &p)
	if err != nil {
		return nil, fmt.Errorf("ask overlay driver how to extract: %w", err)
	}
	if err := s.store.CleanupStagedLayer(out); err != nil {
		return nil, fmt.Errorf("ask overlay driver how to extract: %w", err)
	}
	if p.format != drivers.DifferOutputFormatDir || p.options.ForceMask != nil {
		return nil, nil // composefs, or modes that are kept in xattrs
	}
	return p.options, nil
}

// A probe is a differ that only looks at what the driver asks of it.
type probe struct {
	options *sarchive.TarOptions
	format  drivers.DifferOutputFormat
}

func (p *probe) ApplyDiff(_ string, options *sarchive.TarOptions, differ *drivers.DifferOptions) (drivers.DriverWithDifferOutput, error) {
	p.options, p.format = options, differ.Format
	return drivers.DriverWithDifferOutput{}, nil
}

func (p *probe) Close() error { return nil }

// label gives the staging folder the SELinux label of the driver's home: what
// is created in it inherits it, and keeps it when renamed.
func (s *Store) label() error {
	const name = "security.selinux"
	buf := make([]byte, 4096)
	n, err := unix.Lgetxattr(s.home(), name, buf)
	if err != nil {
		return nil // no SELinux here
	}
	if err := unix.Lsetxattr(s.staging, name, buf[:n], 0); err != nil {
		return fmt.Errorf("label %s: %w", s.staging, err)
	}
	return nil
}

// lock takes the lock that only one agent may have (flock(2): it dies with the process).
func lock(ctx context.Context, path string, waiting func(string)) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for told := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !told && waiting != nil {
			waiting(holder(f))
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for %s: %w", path, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// holder says which process has the lock, as far as the kernel tells (proc_locks(5)).
func holder(f *os.File) string {
	var st unix.Stat_t
	b, err := os.ReadFile("/proc/locks")
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil {
		return "unknown process"
	}
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 5 && fields[1] == "FLOCK" && fields[5] == id {
			cmd, _ := os.ReadFile("/proc/" + fields[4] + "/comm")
			return fmt.Sprintf("process %s (%s)", fields[4], strings.TrimSpace(string(cmd)))
		}
	}
	return "unknown process"
}
