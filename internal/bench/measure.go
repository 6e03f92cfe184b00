package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const interval = 20 * time.Millisecond // between two looks at the memory

// A sample is what one run of a command cost.
type sample struct {
	wall   time.Duration
	sync   time.Duration // syncfs of the store, when it had ended
	cpu    time.Duration // of it and of all that it waited for
	rss    int64         // peak of the sum of its processes
	maxRSS int64         // of the largest of its processes, as getrusage(2) says
	wrote  int64         // what it gave to write(2) itself, without its children
	out    []byte
}

func (s sample) seconds() float64 { return (s.wall + s.sync).Seconds() }
func (s sample) work() float64    { return s.cpu.Seconds() }
func (s sample) memory() float64  { return float64(max(s.rss, s.maxRSS)) / (1 << 20) }

// A store is an empty folder for containers-storage, that goes away.
type store struct {
	dir  string // file system of the store
	root string // graph root
	conf string // storage.conf: the agent, podman and skopeo find the store alike
}

const (
	ram  = "RAM"
	disk = "disk"
)

// in calls f with an empty store.
func (b *bench) in(place string, f func(*store) error) (err error) {
	dir := filepath.Join(b.dir, "store")
	s := &store{dir: dir, root: filepath.Join(dir, "root"), conf: filepath.Join(dir, "storage.conf")}
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove(dir)) }()
	if place == ram {
		if err := tmpfs(dir); err != nil {
			return err
		}
	}
	if err := errors.Join(os.Mkdir(s.root, 0o755), os.Mkdir(run, 0o755)); err != nil {
		return err
	}
	if err := tmpfs(run); err != nil {
		return err
	}
	conf := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", s.root, run)
	if err := os.WriteFile(s.conf, []byte(conf), 0o644); err != nil {
		return err
	}
	return f(s)
}

func tmpfs(dir string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	return nil
}

// remove unmounts what is mounted on dir and below it, podman's mount of ROOT/overlay on itself too, and removes dir.
func remove(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(mounts), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(fields[4])
		if point != dir && !strings.HasPrefix(point, dir+"/") {
			continue
		}
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	rm := exec.Command("rm", "-rf", "--one-file-system", "--", dir)
	rm.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the terminal's interrupt is not for it
	rm.Stderr = os.Stderr
	if err := rm.Run(); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// measure runs a command.
func (b *bench) measure(ctx context.Context, s *store, name string, args ...string) (m sample, err error) {
	if _, err := syncfs(b.dir); err != nil { // what others wrote before is not to be paid by this one
		return m, err
	}
	// A child's ru_maxrss begins with the peak of its parent.
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return m, fmt.Errorf("reset peak RSS: %w", err)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CONTAINERS_STORAGE_CONF="+s.conf)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return m, err
	}
	ended := make(chan struct{})
	peak := make(chan int64)
	go func() { peak <- watch(cmd.Process.Pid, ended) }()
	for {
		if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
			break
		}
	}
	m.wall = time.Since(began)
	close(ended)
	m.rss = <-peak
	m.wrote = written(cmd.Process.Pid) // not reaped yet
	if err := cmd.Wait(); err != nil {
		return m, fmt.Errorf("%.200s: %w\n%s%s", cmd, err, out.Bytes(), errs.Bytes())
	}
	m.out = out.Bytes()
	m.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	m.maxRSS = cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
	m.sync, err = syncfs(s.dir)
	return m, err
}

func syncfs(dir string) (time.Duration, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	began := time.Now()
	err = unix.Syncfs(int(f.Fd()))
	return time.Since(began), err
}

// watch returns the peak of what a process and its descendants have in memory.
func watch(pid int, ended <-chan struct{}) (peak int64) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		peak = max(peak, resident(strconv.Itoa(pid)))
		select {
		case <-tick.C:
		case <-ended:
			return peak
		}
	}
}

func resident(pid string) (sum int64) {
	dir := filepath.Join("/proc", pid)
	statm, _ := os.ReadFile(filepath.Join(dir, "statm")) // it may be gone, here and below
	if f := strings.Fields(string(statm)); len(f) > 1 {
		pages, _ := strconv.ParseInt(f[1], 10, 64)
		sum = pages * int64(os.Getpagesize())
	}
	threads, _ := os.ReadDir(filepath.Join(dir, "task"))
	for _, t := range threads {
		children, _ := os.ReadFile(filepath.Join(dir, "task", t.Name(), "children"))
		for _, child := range strings.Fields(string(children)) {
			sum += resident(child)
		}
	}
	return sum
}

func written(pid int) (n int64) {
	io, _ := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	for line := range strings.Lines(string(io)) {
		if v, ok := strings.CutPrefix(line, "wchar: "); ok {
			n, _ = strconv.ParseInt(strings.TrimSpace(v), 10, 64)
		}
	}
	return n
}

// interleave runs all peers in every round, beginning with another one each time, each with a store of its own, or with
// none if place is "". The samples are by peer, then by round.
func (b *bench) interleave(place string, peers []string, run func(peer int, s *store) (sample, error)) ([][]sample, error) {
	all := make([][]sample, len(peers))
	for round := range b.rounds {
		for k := range peers {
			i := (round + k) % len(peers)
			var m sample
			once := func(s *store) (err error) {
				m, err = run(i, s)
				return err
			}
			var err error
			if place == "" {
				err = once(nil)
			} else {
				err = b.in(place, once)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", peers[i], err)
			}
			fmt.Fprintf(os.Stderr, "round %d of %d %-4s %7.2f s, %7.2f s CPU, %4.0f MiB  %s\n", round+1, b.rounds, place, m.seconds(), m.cpu.Seconds(), m.memory(), peers[i])
			all[i] = append(all[i], m)
		}
	}
	return all, nil
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// each is one figure of every sample.
func each(samples []sample, figure func(sample) float64) (v []float64) {
	for _, s := range samples {
		v = append(v, figure(s))
	}
	return v
}

// ratios are those of a figure, round by round.
func ratios(a, b []sample, figure func(sample) float64) (v []float64) {
	for i := range a {
		v = append(v, figure(a[i])/figure(b[i]))
	}
	return v
}

// figure adds the medians of a peer's samples.
func (b *bench) figure(place, what string, samples []sample) {
	seconds := func(of func(sample) time.Duration) string {
		return fmt.Sprintf("%.2f s", median(each(samples, func(s sample) float64 { return of(s).Seconds() })))
	}
	mebi := func(of func(sample) int64) string {
		return fmt.Sprintf("%.0f MiB", median(each(samples, func(s sample) float64 { return float64(of(s)) / (1 << 20) })))
	}
	b.figures.add(place, what,
		seconds(func(s sample) time.Duration { return s.wall }), seconds(func(s sample) time.Duration { return s.sync }), seconds(func(s sample) time.Duration { return s.cpu }),
		mebi(func(s sample) int64 { return s.rss }), mebi(func(s sample) int64 { return s.maxRSS }))
}

// target adds a ratio of each round, or another figure, and what it is to be.
func (b *bench) target(place, what, format string, v []float64, target string) {
	f := func(x float64) string { return fmt.Sprintf(format, x) }
	spread := ""
	if len(v) > 1 {
		spread = f(slices.Min(v)) + " to " + f(slices.Max(v))
	}
	b.targets.add(place, what, f(median(v)), spread, target)
}
