package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The main thread cannot end, so nothing that changes its thread for good may run on it: the main function keeps it.
func init() { runtime.LockOSThread() }

// private runs f on a thread of its own, in a mount namespace of its own. What f and its commands mount is gone
// with the thread at the latest.
func private(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		err := errors.New("ended early")
		defer func() { done <- err }()
		if e := unix.Unshare(unix.CLONE_NEWNS); e != nil {
			err = fmt.Errorf("unshare mount namespace: %w", e)
			return
		}
		if e := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); e != nil {
			err = fmt.Errorf("make mounts private: %w", e)
			return
		}
		err = f()
	}()
	return <-done
}

// run runs a command to its end. The error has what it said.
func run(name string, args ...string) error {
	_, err := output(name, args...)
	return err
}

func runContext(ctx context.Context, name string, args ...string) error {
	_, err := finish(exec.CommandContext(ctx, name, args...))
	return err
}

// output is run with the command's standard output.
func output(name string, args ...string) (string, error) {
	return finish(exec.Command(name, args...))
}

func finish(cmd *exec.Cmd) (string, error) {
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		said := errs.String() + out.String()
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, said[max(0, len(said)-4000):])
	}
	return out.String(), nil
}

// A process is one that goes on beside the test, and ends with it at the latest.
type process struct {
	os   *os.Process
	done chan struct{} // closed when it has ended
	err  error         // how, then
	cpu  time.Duration
}

// start starts a process. Its death signal is bound to the thread that started it, which therefore is its own.
func start(cmd *exec.Cmd) (*process, error) {
	p := &process{done: make(chan struct{})}
	started := make(chan error, 1)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		p.os = cmd.Process
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			p.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// kill ends the process at once, and waits until it is gone.
func (p *process) kill() {
	_ = p.os.Kill() // it may be gone
	<-p.done
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Build builds a program of this module as it is released: static, and small.
func Build(pkg, to string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-tags", tags, "-ldflags", "-s -w", "-o", to, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	_, err := finish(cmd)
	return err
}

const tags = "remote,containers_image_openpgp,exclude_graphdriver_btrfs"
