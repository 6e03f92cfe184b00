package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/manifest"
	"github.com/precache/precache-agent/internal/metrics"
	"github.com/precache/precache-agent/internal/mount"
	"github.com/precache/precache-agent/internal/podman"
	"github.com/precache/precache-agent/internal/storage"
	"github.com/precache/precache-agent/internal/systemd"
)

// The stages of a node's life in which the agent runs, what it loads there,
// and for how long at most.
const (
	discovery = "discovery"
	install   = "install"
)

var (
	stageGroups  = map[string][]string{discovery: {"ai"}, install: {"ocp"}}
	stageTimeout = map[string]time.Duration{discovery: 15 * time.Minute, install: 60 * time.Minute}
)

// scope is where policy.json finds the archives of a partition that is mounted
// nowhere: where the scripts that came before the agent mounted it.
const scope = "/var/mnt"

type runFlags struct {
	stage      string
	label      string
	device     string
	wait       time.Duration
	timeout    time.Duration
	readyAfter string
	essential  string
	retireWhen string
	listen     string
	jobs       int
	attempts   int
	store      storage.Options
}

func runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run [flags]",
		Short: "Load the images for this stage of the node's life, as a service",
		Long: `Wait for the partition, mount it where nobody else sees it, load what this stage
of the node's life needs, release the partition, and tell systemd. Whatever goes
wrong is said, and the boot goes on.`,
		Example: "  precache-agent run --stage install",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runService(cmd, f) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.stage, "stage", "auto", "discovery, install or auto: by what was booted")
	flags.StringVar(&f.label, "label", "data", "GPT label of the partition")
	flags.StringVar(&f.device, "device", "", "device of the partition, instead of its label")
	flags.DurationVar(&f.wait, "wait", 30*time.Second, "how long to wait for the partition to appear")
	flags.DurationVar(&f.timeout, "timeout", 0, "how long to run at most (default 15m in discovery, 60m in install)")
	flags.StringVar(&f.readyAfter, "ready-after", "all", "all, or essential: let the boot go on when what it waits for is there (install only)")
	flags.StringVar(&f.essential, "essential", "", "file with the references that are essential, one a line (default: by their names in mapping.txt)")
	flags.StringVar(&f.retireWhen, "retire-when", "/etc/precache-agent/retired", "load nothing when this file is there")
	flags.StringVar(&f.listen, "listen", "", "address to serve metrics on while running; the unit has no network, its metrics socket serves them")
	flags.IntVar(&f.jobs, "jobs", 0, "archives read at the same time (default: the CPUs it may use)")
	flags.IntVar(&f.attempts, "attempts", 3, "how often an image is tried when its failure may pass")
	storeFlags(cmd, &f.store)
	return cmd
}

// A service is one run of the agent at boot. What happens is told in all places at once.
type service struct {
	f      runFlags
	log    *slog.Logger
	notify systemd.Notifier
	m      *metrics.Metrics
	files  []string // the text files of the metrics: of the boot, and one that stays
	out    io.Writer

	jobs    int
	retired string // why nothing is loaded any more; empty: it is
	total   loader.Summary
	bytes   atomic.Int64
	size    int64        // of the archives to be read
	ended   atomic.Int64 // images that have their end
	images  int          // of the set
	began   time.Time
}

func runService(cmd *cobra.Command, f runFlags) error {
	if f.stage == "auto" {
		f.stage = stageOf("/")
	}
	if stageGroups[f.stage] == nil {
		return &exitError{code: exitUsage, err: errors.New("--stage is discovery, install or auto")}
	}
	if f.readyAfter != "all" && f.readyAfter != "essential" || f.readyAfter == "essential" && f.stage != install {
		return &exitError{code: exitUsage, err: errors.New("--ready-after is all, or, in the install stage, essential")}
	}
	if f.attempts < 1 || f.jobs < 0 {
		return &exitError{code: exitUsage, err: errors.New("--jobs is not negative, and --attempts at least 1")}
	}
	if f.timeout == 0 {
		f.timeout = stageTimeout[f.stage]
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
	defer cancel()
	s := &service{
		f: f, jobs: threads(f.jobs), m: metrics.New(version, f.stage), began: time.Now(), out: cmd.OutOrStdout(),
		log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{ReplaceAttr: withoutTime})).With("stage", f.stage),
		files: []string{
			filepath.Join(directory("RUNTIME_DIRECTORY", "/run/precache-agent"), "metrics.prom"),
			filepath.Join(directory("STATE_DIRECTORY", "/var/lib/precache-agent"), "metrics.prom"),
		},
	}
	if f.listen != "" {
		stop, err := s.serve(f.listen)
		if err != nil {
			return &exitError{code: exitUnexpected, err: err}
		}
		defer stop()
	}
	s.m.Reached("start")
	s.write(s.files[:1])
	err := s.run(ctx)
	code := exitOK
	var e *exitError
	if errors.As(err, &e) {
		code = e.code
	} else if err != nil {
		code = exitUnexpected
	}
	s.m.Reached("end")
	s.m.Succeeded(code == exitOK)
	s.write(s.files)
	line := s.summary(err)
	s.notify.Status("%s", line)
	fmt.Fprintf(s.out, "precache-agent: %s\n", line) // the unit sends this one to the console as well
	if err != nil {
		return &exitError{code: code, hint: hintOf(err)}
	}
	s.notify.Ready()
	return nil
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey { // the journal has a better one
		return slog.Attr{}
	}
	return a
}

// directory is one that systemd made for the service (systemd.exec(5)), or where it would be.
func directory(variable, otherwise string) string {
	if dir, _, _ := strings.Cut(os.Getenv(variable), ":"); dir != "" {
		return dir
	}
	return otherwise
}

// stageOf tells the stage from what was booted: the live ISO, or the installed system.
func stageOf(root string) string {
	if _, err := os.Stat(filepath.Join(root, "run/ostree-live")); err == nil {
		return discovery
	}
	b, err := os.ReadFile(filepath.Join(root, "proc/cmdline"))
	if err == nil && slices.ContainsFunc(strings.Fields(string(b)), func(arg string) bool {
		return strings.HasPrefix(arg, "coreos.liveiso=") || strings.HasPrefix(arg, "coreos.live.rootfs_url=")
	}) {
		return discovery
	}
	return install
}

// run does the work. What it returns is nil, or an exitError.
func (s *service) run(ctx context.Context) error {
	if _, err := os.Stat(s.f.retireWhen); s.f.retireWhen != "" && err == nil {
		s.retired = fmt.Sprintf("there is %s", s.f.retireWhen)
		return nil
	}
	s.log.Info("waiting for the partition", "partition", s.partition(), "version", version, "selinux", selinuxContext())
	s.notify.Status("waiting for the partition %s", s.partition())
	mnt, err := mount.Open(ctx, mount.Options{
		Label: s.f.label, Device: s.f.device, Wait: s.f.wait,
		Accept: func(root *os.Root) bool {
			groups, err := manifest.Groups(root.FS())
			return err == nil && len(groups) > 0
		},
		Note: s.log.Info,
	})
	s.m.Phase("wait", time.Since(s.began))
	if err != nil {
		s.log.Error("no partition to load from, images come over the network", "partition", s.partition(), "error", err)
		return &exitError{code: exitNoPartition, err: fmt.Errorf("no partition %s to load from: %w", s.partition(), err)}
	}
	released := false
	release := func() error {
		if released {
			return nil
		}
		released = true
		return mnt.Close()
	}
	defer release()
	s.log.Info("partition is mounted", "device", mnt.Device, "type", mnt.FSType)

	set, err := manifest.Read(mnt.Root.FS(), stageGroups[s.f.stage])
	if err != nil {
		s.log.Error("list cannot be read, images come over the network", "error", err)
		return &exitError{code: exitBadList, err: err}
	}
	if release := clusterRelease("/"); release != "" && s.f.stage == install && !inSet(set, release) {
		s.retired = fmt.Sprintf("the cluster runs a release that is not in the set, %s", release)
		return nil
	}
	essential := set.Images
	var rest []manifest.Image
	if s.f.readyAfter == "essential" {
		if essential, rest, err = s.split(mnt.Root, set); err != nil {
			return &exitError{code: exitBadList, err: err}
		}
	}
	part := &archive.Partition{Root: mnt.Root, Path: scope, Room: &archive.Room{}, Moved: s.moved}
	s.listed(part, set)

	s.f.store.Waiting = func(holder string) { s.log.Info("waiting for another agent", "holder", holder) }
	store, err := storage.Open(ctx, s.f.store)
	if err != nil {
		s.log.Error("store cannot be opened, images come over the network", "error", err)
		return &exitError{code: exitUnexpected, err: err}
	}
	defer func() {
		if err := store.Close(); err != nil {
			s.log.Error("store cannot be closed", "error", err)
		}
	}()
	report := make(chan struct{})
	defer close(report)
	go s.keepWriting(report)

	for _, bad := range set.Bad {
		s.event(loader.Event{State: loader.Failed, Ref: bad.Text, Err: bad, Reason: archive.BadReference})
		s.total.Images++
		s.total.Failed++
	}
	// The moment the last archive is read, and so before READY: the installer, for one, must find the disk unused.
	allRead := func() {
		if err := release(); err != nil {
			s.log.Error("partition cannot be released", "error", err)
		}
	}
	first := allRead
	if rest != nil {
		first = nil
	}
	if err := s.load(ctx, part, store, essential, first); err != nil {
		return err
	}
	if rest != nil {
		s.log.Info("what the boot waits for is there, the rest is loaded in the background", "images", len(essential), "rest", len(rest))
		s.m.Reached("ready")
		s.notify.Ready()
		if err := systemd.LowerWeight(ctx, "precache-agent.service"); err != nil {
			s.log.Info("weight cannot be lowered", "error", err)
		}
		if err := s.load(ctx, part, store, rest, allRead); err != nil {
			return err
		}
	}
	if rest == nil {
		s.m.Reached("ready")
	}
	s.ask(ctx, set)
	if s.total.Failed > 0 {
		return &exitError{code: exitIncomplete, err: fmt.Errorf("%d of %d images are not in the store", s.total.Failed, s.total.Images)}
	}
	return nil
}

func (s *service) partition() string {
	if s.f.device != "" {
		return s.f.device
	}
	return s.f.label
}

// listed takes down what there is to do.
func (s *service) listed(part *archive.Partition, set *manifest.Set) {
	for _, warning := range set.Warnings {
		s.log.Warn("line is ignored", "error", warning)
	}
	for _, img := range set.Images {
		if a, err := part.Find(img); err == nil {
			s.size += a.Size
		}
	}
	s.images = len(set.Images) + len(set.Bad)
	s.m.Listed(s.images)
	s.log.Info("set is read", "groups", strings.Join(set.Groups, " "), "images", len(set.Images), "bad_lines", len(set.Bad), "bytes", s.size)
}

func (s *service) load(ctx context.Context, part *archive.Partition, store *storage.Store, images []manifest.Image, allRead func()) error {
	before := part.BytesRead()
	sum, err := loader.Load(ctx, loader.Options{
		Images: images, Partition: part, Store: store, Jobs: s.jobs, Attempts: s.f.attempts, Report: s.event, AllRead: allRead,
	})
	t := &s.total
	t.Images += sum.Images
	t.Loaded += sum.Loaded
	t.Present += sum.Present
	t.Failed += sum.Failed
	t.LayersWritten += sum.LayersWritten
	t.LayersShared += sum.LayersShared
	t.BytesRead += sum.BytesRead - before
	t.BytesWritten += sum.BytesWritten
	t.Took = time.Since(s.began)
	s.m.Phase("load", t.Took)
	if err != nil {
		s.log.Error("load failed", "error", err)
		return &exitError{code: exitUnexpected, err: err}
	}
	return nil
}

// event is where everything that happens to an image passes.
func (s *service) event(e loader.Event) {
	s.m.Event(e)
	attrs := []any{"image", e.Ref, "bytes", e.Bytes, "seconds", e.Took.Seconds()}
	switch e.State {
	case loader.Loaded, loader.Present:
		s.ended.Add(1)
		s.notify.Moved() // into the store, and synced
		s.log.Info("image is "+string(e.State), attrs...)
	case loader.Failed:
		s.ended.Add(1)
		s.log.Error("image failed", append(attrs, "reason", e.Reason, "error", e.Err, "hint", hints[e.Reason])...)
	case loader.Retrying:
		s.log.Warn("image is tried again", append(attrs, "reason", e.Reason, "error", e.Err)...)
	}
}

// moved is told by whoever reads from the partition.
func (s *service) moved(bytes int64) {
	s.bytes.Store(bytes)
	s.notify.Moved()
}

// keepWriting keeps the metrics file and the status line fresh until done is closed.
func (s *service) keepWriting(done <-chan struct{}) {
	for tick := time.NewTicker(2 * time.Second); ; {
		select {
		case <-done:
			tick.Stop()
			return
		case <-tick.C:
			s.write(s.files[:1])
			bytes := s.bytes.Load()
			line := fmt.Sprintf("loaded %d/%d, %s of %s", s.ended.Load(), s.images, size(bytes), size(s.size))
			if bytes > 0 && s.size > bytes {
				left := time.Duration(float64(time.Since(s.began)) * float64(s.size-bytes) / float64(bytes))
				line += fmt.Sprintf(", %s left", left.Round(time.Second))
			}
			s.notify.Status("%s", line)
		}
	}
}

func (s *service) write(files []string) {
	s.m.Read(s.bytes.Load())
	for _, path := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			s.log.Warn("metrics cannot be written", "error", err)
			continue
		}
		if err := s.m.WriteFile(path); err != nil {
			s.log.Warn("metrics cannot be written", "error", err)
		}
	}
}

func (s *service) summary(err error) string {
	t := s.total
	if s.retired != "" {
		return "retired, nothing is loaded: " + s.retired
	}
	if t.Images == 0 {
		return fmt.Sprintf("nothing loaded: %v", err)
	}
	return fmt.Sprintf("%s: %d loaded, %d present, %d failed; layers: %d written, %d shared; %s read, %s written, %s",
		plural(t.Images, "image"), t.Loaded, t.Present, t.Failed, t.LayersWritten, t.LayersShared, size(t.BytesRead), size(t.BytesWritten), took(time.Since(s.began)))
}

func hintOf(err error) string {
	var e *exitError
	if errors.As(err, &e) {
		return e.hint
	}
	return ""
}

// ask asks podman, if its API is there, whether it sees the images too.
func (s *service) ask(ctx context.Context, set *manifest.Set) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var names []string
	for _, img := range set.Images {
		names = append(names, img.Ref)
	}
	unseen, err := podman.Unseen(ctx, podman.Socket, names)
	if errors.Is(err, podman.ErrNoSocket) {
		return
	}
	if err != nil {
		s.log.Warn("podman could not be asked", "error", err)
	}
	s.m.Unseen(len(unseen))
	for _, name := range unseen {
		s.log.Warn("podman does not see image", "image", name)
	}
}

// serve serves the series of this run until stop is called.
func (s *service) serve(addr string) (stop func(), err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", s.m.Handler())
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go server.Serve(l)
	return func() { server.Close() }, nil
}

// clusterRelease is the operating system image that the machine-config-operator
// wants on this node, once it is installed: it belongs to the release that the
// cluster runs. Empty if it does not say.
func clusterRelease(root string) string {
	b, err := os.ReadFile(filepath.Join(root, "etc/machine-config-daemon/currentconfig"))
	if err != nil {
		return ""
	}
	var config struct {
		Spec struct {
			OSImageURL string `json:"osImageURL"`
		} `json:"spec"`
	}
	if json.Unmarshal(b, &config) != nil {
		return ""
	}
	return config.Spec.OSImageURL
}

// inSet reports whether a set has the image that a reference pins. What pins nothing counts as being there.
func inSet(set *manifest.Set, ref string) bool {
	_, pinned, found := strings.Cut(ref, "@")
	if !found {
		return true
	}
	return slices.ContainsFunc(set.Images, func(img manifest.Image) bool { return img.Digest == digest.Digest(pinned) })
}
