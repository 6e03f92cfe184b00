package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

const tags = "remote,containers_image_openpgp,exclude_graphdriver_btrfs"

// The exit codes, as README.md has them.
const (
	exitOK          = 0
	exitUnexpected  = 1
	exitUsage       = 2
	exitIncomplete  = 3
	exitNoPartition = 4
	exitBadList     = 5
	exitInterrupted = 130
)

// time30 is for what ends at once, on however slow a machine.
const time30 = 30 * time.Second

// binary is the agent under test.
var binary string

func TestMain(m *testing.M) {
	// The results depend on the agent's source, of which `go test` learns when the test looks at it.
	for _, dir := range []string{"../../cmd", "../../internal"} {
		if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, _ error) error { _, err := os.Stat(path); return err }); err != nil {
			panic(err)
		}
	}
	dir, err := os.MkdirTemp("", "integration-")
	if err != nil {
		panic(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // an ordinary user runs it too
		panic(err)
	}
	binary = filepath.Join(dir, "precache-agent")
	build := exec.Command("go", "build", "-trimpath", "-tags", tags, "-o", binary, "../../cmd/precache-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	code := 1
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the agent:", err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// An event is one line of --progress json: of an image, or the summary.
type event struct {
	Event, Ref      string
	Bytes           int64
	Seconds         float64
	Error, Reason   string
	Images          int
	Loaded, Present int
	Failed          int
	LayersWritten   int   `json:"layers_written"`
	LayersShared    int   `json:"layers_shared"`
	BytesRead       int64 `json:"bytes_read"`
	BytesWritten    int64 `json:"bytes_written"`
}

// A process is a running agent.
type process struct {
	cmd      *exec.Cmd
	out, err syncBuffer
	began    time.Time
	done     chan struct{} // closed when it has ended
	waitErr  error
	peak     int64 // of resident memory, in bytes, helpers included
}

// An outcome is what became of one.
type outcome struct {
	code     int // -1: a signal ended it
	out, err string
	events   []event
	sum      event // the summary; its Event is empty if there was none
	peak     int64 // of resident memory, in bytes, helpers included
	took     time.Duration
}

// start starts the agent. What it is told last counts.
func start(t testing.TB, args ...string) *process {
	t.Helper()
	return command(args...).start(t)
}

func command(args ...string) *process {
	return &process{cmd: exec.Command(binary, args...), done: make(chan struct{})}
}

func (p *process) start(t testing.TB) *process {
	t.Helper()
	p.cmd.Stdout, p.cmd.Stderr, p.began = &p.out, &p.err, time.Now()
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		quit, sampled := make(chan struct{}), make(chan struct{})
		go p.sample(quit, sampled)
		p.waitErr = p.cmd.Wait()
		close(quit)
		<-sampled
		close(p.done)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
	})
	return p
}

// sample takes the peak of resident memory. The kernel's own, ru_maxrss, is no less than this test's: it counts from before exec.
func (p *process) sample(quit, done chan struct{}) {
	defer close(done)
	for {
		total := memory(p.cmd.Process.Pid)
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.cmd.Process.Pid))
		for _, c := range strings.Fields(string(children)) {
			if pid, err := strconv.Atoi(c); err == nil {
				total += memory(pid)
			}
		}
		p.peak = max(p.peak, total)
		select {
		case <-quit:
			return
		case <-time.After(3 * time.Millisecond):
		}
	}
}

// memory is the highest resident memory of a process so far, in bytes; 0 if it is not the agent, yet or any more.
func memory(pid int) int64 {
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || exe != binary {
		return 0
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return kib << 10
		}
	}
	return 0
}

func (p *process) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
}

// wait waits for the end, at most for so long, and says what came of it.
func (p *process) wait(t testing.TB, most time.Duration) outcome {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(most):
		p.signal(t, syscall.SIGQUIT)
		<-p.done
		t.Fatalf("%q has not ended after %v:\n%s", p.cmd.Args, most, tail(p.err.String()))
	}
	var exit *exec.ExitError
	if p.waitErr != nil && !errors.As(p.waitErr, &exit) {
		t.Fatal(p.waitErr)
	}
	o := outcome{code: p.cmd.ProcessState.ExitCode(), out: p.out.String(), err: p.err.String(), peak: p.peak, took: time.Since(p.began)}
	if strings.Contains(o.err, "panic:") || strings.Contains(o.err, "goroutine ") {
		t.Errorf("%q panics:\n%s", p.cmd.Args, tail(o.err))
	}
	return o
}

// agent runs the agent to its end.
func agent(t testing.TB, args ...string) outcome {
	t.Helper()
	return start(t, args...).wait(t, 2*time.Minute)
}

// loadArgs are those of a load whose events are read.
func loadArgs(s *storetest.Store, from string, flags ...string) []string {
	args := append([]string{"load", "--from", from, "--progress", "json"}, s.Flags()...)
	return append(args, flags...)
}

// load loads a partition, with podman beside it.
func load(t testing.TB, s *storetest.Store, from string, flags ...string) outcome {
	t.Helper()
	stop := storetest.Beside(t, s)
	defer stop()
	o := agent(t, loadArgs(s, from, flags...)...)
	o.read(t)
	return o
}

// mustLoad is load where every image must get into the store.
func mustLoad(t testing.TB, s *storetest.Store, from string, flags ...string) outcome {
	t.Helper()
	o := load(t, s, from, flags...)
	if o.code != exitOK {
		t.Fatalf("load ends with %d, want 0:\n%s%s", o.code, tail(o.out), tail(o.err))
	}
	return o
}

// read reads the events.
func (o *outcome) read(t testing.TB) {
	t.Helper()
	for line := range strings.Lines(o.out) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("standard output has a line that is no JSON object: %q", line)
		}
		o.events = append(o.events, e)
		if e.Event == "summary" {
			o.sum = e
		}
	}
}

// ends are the last events of the images, by reference.
func (o outcome) ends() map[string]event {
	ends := map[string]event{}
	for _, e := range o.events {
		if e.Event == "loaded" || e.Event == "present" || e.Event == "failed" {
			ends[e.Ref] = e
		}
	}
	return ends
}

// A syncBuffer is what a process has written so far.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func tail(s string) string {
	const most = 3000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}

// partition stages what is given in a folder of its own.
func partition(t testing.TB, items ...fixture.Item) (dir string, staged []fixture.Staged) {
	t.Helper()
	dir = t.TempDir()
	staged, err := fixture.Partition{Dir: dir, Items: items}.Write()
	if err != nil {
		t.Fatal(err)
	}
	return dir, staged
}

func layer(t testing.TB, spec fixture.LayerSpec) *fixture.Layer {
	t.Helper()
	l, err := fixture.NewLayer(spec)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func image(t testing.TB, spec fixture.ImageSpec) *fixture.Image {
	t.Helper()
	i, err := fixture.NewImage(spec)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func list(t testing.TB, spec fixture.ListSpec) *fixture.Image {
	t.Helper()
	i, err := fixture.NewList(spec)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// loop does what users do today: untar each archive, and copy what is in it with skopeo.
func loop(t testing.TB, s *storetest.Store, staged []fixture.Staged) {
	t.Helper()
	for _, st := range staged {
		dir := untar(t, st.Path)
		s.Skopeo(t, "copy", "--quiet", "dir:"+dir, "containers-storage:"+st.Ref)
	}
}

// untar unpacks an archive and returns the image's folder.
func untar(t testing.TB, archive string) string {
	t.Helper()
	dir := t.TempDir()
	storetest.Run(t, "tar", "-C", dir, "-xf", archive)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%s has %d folders in it, want 1 (%v)", archive, len(entries), err)
	}
	return filepath.Join(dir, entries[0].Name())
}
