// Command bench measures the agent against its peers, in the same run: the loop of podman, tar and skopeo that it
// replaces, and the floor, which is gunzip and tar of every distinct layer once. Rounds are interleaved, because only
// ratios of runs of the same minute say much on a machine that others use too. No time makes it fail: it prints the
// targets beside the ratios. hack/bench.sh builds and calls it, as root.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

type bench struct {
	agent       string // a copy of the binary: a build beside the bench does not change it
	dir         string // all that the bench writes
	rounds      int
	jobs        int
	places      []string
	images      int
	layerBytes  int64
	tiny        int
	exists      int
	windowBytes int64

	corpora map[string]corpus
	figures table
	targets table
	syncs   table
	notes   []string
}

var parts = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"images", (*bench).partImages}, {"present", (*bench).partPresent}, {"tiny", (*bench).partTiny},
	{"multiarch", (*bench).partMultiArch}, {"memory", (*bench).partMemory}, {"sync", (*bench).partSync},
}

func main() {
	b := bench{rounds: 3, images: 12, layerBytes: 35e6, tiny: 400, exists: 40, windowBytes: 72 << 20}
	if os.Getenv("BENCH_QUICK") == "1" {
		b = bench{rounds: 1, images: 4, layerBytes: 4e6, tiny: 40, exists: 10, windowBytes: 8 << 20}
		b.notes = append(b.notes, "BENCH_QUICK: a small corpus, whose ratios are not those that the targets mean.")
	}
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	flag.StringVar(&b.agent, "agent", "bin/precache-agent", "`FILE` to measure")
	parent := flag.String("dir", cmp.Or(os.Getenv("TMPDIR"), "/var/tmp"), "existing folder on the disk to measure, with 5 GB of room; what is written there goes away at the end")
	flag.IntVar(&b.rounds, "rounds", b.rounds, "how often each peer runs")
	flag.IntVar(&b.jobs, "jobs", 2, "of the agent and of the floor")
	flag.IntVar(&b.images, "images", b.images, "how many that share three of their four layers")
	flag.Int64Var(&b.layerBytes, "layer-bytes", b.layerBytes, "in each of their layers, uncompressed")
	flag.IntVar(&b.tiny, "tiny", b.tiny, "how many tiny images, and a fourth of them")
	flag.IntVar(&b.exists, "exists", b.exists, "how many times podman image exists is run, to be scaled to -tiny")
	only := flag.String("parts", strings.Join(names, ","), "what to measure")
	places := flag.String("stores", ram+","+disk, "where the stores are that images and tiny are loaded into")
	keep := flag.Bool("keep", false, "leave the staged images in place")
	flag.Parse()
	chosen := strings.Split(*only, ",")
	b.places = strings.Split(*places, ",")
	unknown := func(known []string) func(string) bool {
		return func(s string) bool { return !slices.Contains(known, s) }
	}
	if flag.NArg() > 0 || slices.ContainsFunc(chosen, unknown(names)) || slices.ContainsFunc(b.places, unknown([]string{ram, disk})) ||
		min(b.rounds, b.jobs, b.images, b.exists, b.tiny/4) < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	quiet := context.AfterFunc(ctx, func() { fmt.Fprintln(os.Stderr, "interrupted: removing what was written") })
	err := b.run(ctx, *parent, chosen, *keep)
	quiet()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		if errors.Is(err, context.Canceled) {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, parent string, chosen []string, keep bool) (err error) {
	if b.dir, err = os.MkdirTemp(parent, "precache-bench-"); err != nil {
		return err
	}
	defer func() {
		if keep {
			fmt.Fprintln(os.Stderr, "left in place:", b.dir)
			return
		}
		err = errors.Join(err, remove(b.dir))
	}()
	b.corpora = map[string]corpus{}
	if err := b.prepare(); err != nil {
		return err
	}
	b.figures.head = []string{"store", "what", "wall", "sync after", "CPU", "peak RSS", "ru_maxrss"}
	b.targets.head = []string{"store", "ratio or figure", "median", "range", "target"}
	b.syncs.head = []string{"load on disk", "call", "calls", "time in it", "of"}
	for _, p := range parts {
		if slices.Contains(chosen, p.name) {
			err := p.run(b, ctx)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	return b.print(os.Stdout)
}

func (b *bench) prepare() error {
	binary, err := os.ReadFile(b.agent)
	if err != nil {
		return err
	}
	b.agent = filepath.Join(b.dir, "precache-agent")
	return errors.Join(
		os.WriteFile(b.agent, binary, 0o755),
		os.WriteFile(b.policy(), []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o644),
		os.Mkdir(b.tmp(), 0o755))
}

func (b *bench) policy() string { return filepath.Join(b.dir, "policy.json") }
func (b *bench) tmp() string    { return filepath.Join(b.dir, "tmp") }

func (b *bench) print(w io.Writer) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(b.dir, &fs); err != nil {
		return err
	}
	disk := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "XFS", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs"}[int64(fs.Type)]
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	fmt.Fprintf(w, `Medians of %d interleaved rounds, and ratios round by round; agent and floor with %d jobs. The loop, for each image: podman image
exists, tar xzf, skopeo copy dir: containers-storage:, rm. The floor: gunzip | tar -x of every distinct layer once. The archives
were read before, so they are in the page cache, and the disk is synced before each run. Store in RAM: tmpfs; on disk: %s.
Sync after: a syncfs when the command has ended, which the ratios count. CPU: user and system, of all processes. Peak RSS: the sum
of the processes, looked at every %v; ru_maxrss: of the largest of them. As a figure, peak RSS is the larger of both.
`, b.rounds, b.jobs, cmp.Or(disk, fmt.Sprintf("file system %#x", fs.Type)), interval)
	for _, t := range []table{b.figures, b.targets, b.syncs} {
		t.write(w)
	}
	fmt.Fprintln(w)
	for _, n := range b.notes {
		fmt.Fprintf(w, "* %s\n", n)
	}
	fmt.Fprintf(w, "* %d CPUs, %s, Linux %s, %s, %s, %s\n", runtime.NumCPU(), runtime.GOARCH, unix.ByteSliceToString(u.Release[:]), runtime.Version(), version("podman"), version("skopeo"))
	return nil
}

func version(tool string) string {
	out, err := exec.Command(tool, "--version").Output()
	if err != nil {
		return tool + ": " + err.Error()
	}
	return strings.TrimSpace(string(out))
}

// A table is one of Markdown.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) write(w io.Writer) {
	if len(t.rows) == 0 {
		return
	}
	fmt.Fprintf(w, "\n| %s |\n|%s\n", strings.Join(t.head, " | "), strings.Repeat("---|", len(t.head)))
	for _, r := range t.rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(r, " | "))
	}
}
