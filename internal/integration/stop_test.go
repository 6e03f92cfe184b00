package integration

import (
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/fixture"
	"github.com/precache/precache-agent/internal/storetest"
)

// slow are images that take long enough to be interrupted anywhere: six, of two shared layers, one of their own, and
// one that is the same for all but stands on their own one.
var slow = sync.OnceValue(func() (items []fixture.Item) {
	content := func(name string) *fixture.Layer {
		var entries []fixture.Entry
		noise := rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32s", name))))
		for n := range 60 {
			data := make([]byte, 8<<10)
			noise.Read(data)
			entries = append(entries, fixture.Entry{Name: fmt.Sprintf("%s/%d/file", name, n), Data: hex.EncodeToString(data), UID: n})
		}
		l, err := fixture.NewLayer(fixture.LayerSpec{Entries: entries})
		if err != nil {
			panic(err) // entries of this test's own
		}
		return l
	}
	one, two, top := content("one"), content("two"), content("top")
	for n := range 6 {
		img, err := fixture.NewImage(fixture.ImageSpec{Layers: []*fixture.Layer{one, two, content(fmt.Sprint("own", n)), top}})
		if err != nil {
			panic(err)
		}
		items = append(items, fixture.Item{Ref: "registry.example.com/slow/image", Image: img})
	}
	return items
})

// ofTheLibrary is what it leaves when it is killed: a link that it had made but not noted yet which layer's, and the
// folder in which it tries what the kernel can do. Podman leaves them as well.
var ofTheLibrary = regexp.MustCompile(`^overlay/(l/[A-Z0-9]{26}|[a-z-]+[0-9]+) should not be there$`)

// A load that is stopped, at whatever moment, and run again comes to what one that was left alone comes to. SIGTERM
// loses nothing that was finished; SIGKILL no more than what was in the making.
func TestInterrupted(t *testing.T) {
	storetest.Need(t, "podman")
	const rounds = 20
	dir, staged := partition(t, slow()...)
	in := storetest.Mount(t, storetest.Tmpfs)
	want := storetest.New(t, in, "alone", "overlay")
	alone := mustLoad(t, want, dir)
	storetest.Check(t, want)
	layers := len(distinct(staged))
	if alone.sum.LayersWritten != layers {
		t.Errorf("a load that is left alone writes %d layers, want %d", alone.sum.LayersWritten, layers)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			stopped, kept, round := 0, 0, 0
			takes := alone.sum.Seconds // it was perhaps slower than what comes
			for ; round < rounds || stopped < rounds/3 && round < 4*rounds; round++ {
				s := storetest.New(t, in, fmt.Sprintf("%d-%d", sig, round), "overlay")
				at := time.Duration(rand.Float64() * rand.Float64() * takes * float64(time.Second)) // rather early
				written, before := 0, 0
				var o outcome
				whole := stopped
				for range 1 + round%2 { // every other time twice
					if o = interrupt(t, s, dir, sig, at, round%4 >= 2); o.code != exitOK {
						stopped++
					} else {
						takes = min(takes, o.sum.Seconds)
					}
					if sig == syscall.SIGTERM {
						terminated(t, o, len(staged))
						written += o.sum.LayersWritten
					}
					if before = complete(t, s); sig == syscall.SIGTERM && before != written {
						t.Errorf("%d layers are in the store or staged whole, the summaries say that %d were written", before, written)
					}
				}
				last := mustLoad(t, s, dir)
				if last.sum.LayersWritten != layers-before {
					t.Errorf("%d of %d layers were complete, and the last run writes %d", before, layers, last.sum.LayersWritten)
				}
				for _, fault := range storetest.Faults(t, s) {
					if sig != syscall.SIGKILL || !ofTheLibrary.MatchString(fault) {
						t.Errorf("the store is not whole: %s", fault)
					}
				}
				if stopped > whole {
					storetest.Compare(t, s, want)
				}
				if t.Failed() {
					t.Fatalf("in round %d, stopped after %v of %.1f s:\n%s%s", round, at, alone.sum.Seconds, tail(o.out), tail(o.err))
				}
				kept += before
				drop(t, s)
			}
			t.Logf("%d loads were stopped in %d rounds, %.1f of %d layers kept on average", stopped, round, float64(kept)/float64(round), layers)
			if stopped < rounds/3 {
				t.Errorf("only %d loads were stopped in %d rounds: the moments are badly chosen", stopped, round)
			}
		})
	}
}

// interrupt starts a load, with podman beside it, and sends it a signal some time after it has begun, or at once
// when it has begun to commit.
func interrupt(t testing.TB, s *storetest.Store, dir string, sig syscall.Signal, after time.Duration, committing bool) outcome {
	t.Helper()
	stop := storetest.Beside(t, s)
	defer stop()
	index := filepath.Join(s.Root, "overlay-layers/layers.json")
	before, _ := os.Stat(index)
	p := start(t, loadArgs(s, dir)...)
	for began := time.Now(); ; time.Sleep(time.Millisecond / 4) {
		if p.out.String() == "" && after > 20*time.Millisecond { // what is less may also hit its start
			began = time.Now()
		}
		if committing {
			now, err := os.Stat(index)
			if err == nil && (before == nil || !os.SameFile(now, before)) {
				break // it is replaced at every write
			}
		} else if time.Since(began) > after {
			break
		}
		if ended(p) {
			break
		}
	}
	p.signal(t, sig)
	o := p.wait(t, time30)
	if sig != syscall.SIGKILL {
		o.read(t)
	}
	return o
}

func ended(p *process) bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// terminated checks what a load that got SIGTERM says of itself.
func terminated(t testing.TB, o outcome, images int) {
	t.Helper()
	if o.code == exitOK || o.code == -1 && o.out+o.err == "" { // -1: it could not say yet what it does with signals
		return
	}
	if o.code != exitInterrupted {
		t.Errorf("a load that gets SIGTERM ends with %d, want 130\n%s", o.code, tail(o.err))
	}
	if o.sum.Event == "" {
		return // it had not begun
	}
	if n := o.sum.Loaded + o.sum.Present + o.sum.Failed; n != images {
		t.Errorf("the summary says that %d images were loaded, were present or failed, want %d together", n, images)
	}
	for ref, e := range o.ends() {
		if e.Event == "failed" && e.Reason != "interrupted" {
			t.Errorf("%s failed for %q (%s), want interrupted", ref, e.Reason, e.Error)
		}
	}
}

// complete counts the distinct layers that are in the store or staged whole.
func complete(t testing.TB, s *storetest.Store) int {
	t.Helper()
	diffIDs := map[string]bool{}
	for _, l := range s.Layers(t) {
		if len(l.Flags) == 0 {
			diffIDs[l.DiffID] = true
		}
	}
	marks, err := filepath.Glob(filepath.Join(s.Root, ".precache-agent/staging/*/layer.json"))
	check(t, err)
	for _, m := range marks {
		if parts, _ := filepath.Glob(filepath.Join(filepath.Dir(m), "*")); len(parts) < 3 {
			continue // half moved into the store
		}
		hex, _, _ := strings.Cut(filepath.Base(filepath.Dir(m)), ".")
		diffIDs["sha256:"+hex] = true
	}
	return len(diffIDs)
}

// drop removes a store that is not needed any more, to have the room.
func drop(t testing.TB, s *storetest.Store) {
	t.Helper()
	s.Podman(t, "rmi", "--all", "--force")
	if n, m := len(s.Images(t)), len(s.Layers(t)); n > 0 || m > 0 {
		t.Errorf("podman rmi leaves %d images and %d layers", n, m)
	}
}

// The first signal lets it end what it is committing. The second one ends it at once, whatever it is at.
func TestSecondSignal(t *testing.T) {
	storetest.Need(t, "podman")
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	dir, staged := partition(t, slow()...)
	s.Podman(t, "images") // makes the store
	// The lock of the layers, as someone who does not give it back for a long time has it.
	lock, err := os.OpenFile(filepath.Join(s.Root, "overlay-layers/layers.lock"), os.O_RDWR, 0)
	check(t, err)
	defer lock.Close()
	check(t, unix.FcntlFlock(lock.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
	p := start(t, loadArgs(s, dir)...)
	time.Sleep(time.Second / 2)
	p.signal(t, syscall.SIGTERM)
	time.Sleep(time.Second / 2)
	if ended(p) {
		t.Fatalf("it has ended before it had the lock:\n%s%s", p.out.String(), p.err.String())
	}
	began := time.Now()
	p.signal(t, syscall.SIGTERM)
	o := p.wait(t, time30)
	if took := time.Since(began); took > 2*time.Second || o.code == exitOK {
		t.Errorf("after the second signal it ends after %v, with %d, want at once and not with 0", took, o.code)
	}
	check(t, lock.Close())
	if o := mustLoad(t, s, dir); o.sum.Loaded != len(staged) {
		t.Errorf("the next load loads %d images, want %d", o.sum.Loaded, len(staged))
	}
	storetest.Check(t, s)
}

// A layer that was on its way from staging into the store when the agent was killed is done again.
func TestHalfMoved(t *testing.T) {
	storetest.Need(t, "podman")
	in := storetest.Mount(t, storetest.Tmpfs)
	dir, staged := partition(t, slow()...)
	for n, what := range []string{"dir", "tar-split.gz", "layer.json"} {
		t.Run("without "+what, func(t *testing.T) {
			for try := 0; !halfMoved(t, in, fmt.Sprintf("half%d-%d", n, try), dir, staged, what); try++ {
				if try == 10 {
					t.Fatal("every load had begun to commit before it was killed")
				}
			}
		})
	}
}

// halfMoved kills a load while its layers are staged, takes what away from all but one of them, and wants the next load
// to do exactly these again. It reports whether the kill came in time: before anything was committed.
func halfMoved(t *testing.T, in, name, dir string, staged []fixture.Staged, what string) (inTime bool) {
	t.Helper()
	s := storetest.New(t, in, name, "overlay")
	p := start(t, loadArgs(s, dir)...)
	var marks []string
	for len(marks) < 4 && !ended(p) {
		marks, _ = filepath.Glob(filepath.Join(s.Root, ".precache-agent/staging/*/layer.json"))
	}
	p.signal(t, syscall.SIGKILL)
	p.wait(t, time30)
	for _, mark := range marks[min(1, len(marks)):] { // it may have ended first
		check(t, os.RemoveAll(filepath.Join(filepath.Dir(mark), what)))
	}
	want := len(distinct(staged)) - complete(t, s)
	index, _ := os.ReadFile(filepath.Join(s.Root, "overlay-layers/layers.json"))
	inTime = len(index) <= len("[]")
	o := mustLoad(t, s, dir)
	if inTime && o.sum.LayersWritten != want || strings.Contains(o.out, "retrying") {
		t.Errorf("%d layers are written, want %d, and nothing retried:\n%s", o.sum.LayersWritten, want, tail(o.out))
	}
	storetest.Check(t, s)
	return inTime
}

// Two agents on one store: the second says whom it waits for, and finds everything there.
func TestTwoAgents(t *testing.T) {
	storetest.Need(t, "podman")
	s := storetest.New(t, storetest.Mount(t, storetest.Tmpfs), "agent", "overlay")
	dir, staged := partition(t, slow()...)
	stop := storetest.Beside(t, s)
	defer stop()
	one := start(t, loadArgs(s, dir)...)
	for one.out.String() == "" && !ended(one) {
		time.Sleep(time.Millisecond)
	}
	two := start(t, loadArgs(s, dir)...)
	first, second := one.wait(t, time30), two.wait(t, time30)
	first.read(t)
	second.read(t)
	if first.code != exitOK || second.code != exitOK {
		t.Errorf("they end with %d and %d, want 0 and 0\n%s%s", first.code, second.code, tail(first.err), tail(second.err))
	}
	if first.sum.Loaded != len(staged) || second.sum.Present != len(staged) || second.sum.LayersWritten != 0 {
		t.Errorf("the first loads %d images, the second finds %d and writes %d layers; want %d, %[4]d and 0", first.sum.Loaded, second.sum.Present, second.sum.LayersWritten, len(staged))
	}
	if holder := fmt.Sprintf("process %d", one.cmd.Process.Pid); !strings.Contains(second.err, holder) || strings.Count(second.err, "\n") != 1 {
		t.Errorf("the second says %q, want one line that names %s", second.err, holder)
	}
	storetest.Check(t, s)

	// One that waits can be stopped.
	lock, err := os.OpenFile(filepath.Join(s.Root, ".precache-agent/lock"), os.O_RDWR, 0)
	check(t, err)
	defer lock.Close()
	check(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	waiting := start(t, loadArgs(s, dir)...)
	for waiting.err.String() == "" && !ended(waiting) {
		time.Sleep(time.Millisecond)
	}
	waiting.signal(t, syscall.SIGINT)
	if o := waiting.wait(t, time30); o.code != exitInterrupted {
		t.Errorf("an agent that waits and gets SIGINT ends with %d, want 130\n%s", o.code, tail(o.err))
	}
}

// What a killed run left goes at the next one, even if that finds everything there, or is of other images.
func TestLeftoversGo(t *testing.T) {
	storetest.Need(t, "podman")
	in := storetest.Mount(t, storetest.Tmpfs)
	dir, _ := partition(t, slow()...)
	other, _ := partition(t, shapes(t)[0])
	for name, then := range map[string]string{"the same": dir, "others": other} {
		t.Run(name, func(t *testing.T) {
			s := storetest.New(t, in, filepath.Base(then), "overlay")
			mustLoad(t, s, dir)
			for _, left := range []string{"staging/" + strings.Repeat("0", 64) + ".1/dir/file", "tmp/image.1/manifest.json"} {
				path := filepath.Join(s.Root, ".precache-agent", left)
				check(t, os.MkdirAll(filepath.Dir(path), 0o700))
				check(t, os.WriteFile(path, []byte("left"), 0o600))
			}
			mustLoad(t, s, then)
			storetest.Check(t, s)
		})
	}
}
