// Command guest is what a booted machine runs for the test that booted it. It stands in for the services that consume
// images, shows the journal to the outside, and forwards a port to the machine's loopback interface.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/precache/precache-agent/internal/vm/report"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: guest journal | forward | wipe | list FILE | record NAME [FLAG]...")
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "journal":
		err = journal()
	case "forward":
		err = forward()
	case "wipe":
		err = wipe()
	case "list":
		err = list(os.Args[2])
	case "record":
		err = record(os.Args[2], os.Args[3:])
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

// journal becomes journalctl, which writes the journal of this boot to the port of that name.
func journal() error {
	const port = "/dev/virtio-ports/journal"
	for range 600 {
		f, err := os.OpenFile(port, os.O_WRONLY, 0)
		if err != nil {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if err := syscall.Dup2(int(f.Fd()), 1); err != nil {
			return err
		}
		return syscall.Exec("/usr/bin/journalctl", []string{"journalctl", "--boot", "--follow", "--no-tail", "--all", "--output=json"}, os.Environ())
	}
	return fmt.Errorf("no port %s", port)
}

// forward gives the machine its address, and hands on what comes to the ports that the kernel was told of, to the same ports of
// the loopback interface.
func forward() error {
	for range 600 {
		if _, err := os.Stat("/sys/class/net/eth0"); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	for _, args := range [][]string{{"address", "replace", "10.0.2.15/24", "dev", "eth0"}, {"link", "set", "eth0", "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %q: %w: %s", args, err, out)
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	failed := make(chan error)
	for _, word := range strings.Fields(string(cmdline)) {
		if port, ok := strings.CutPrefix(word, report.Port); ok {
			go func() { failed <- forwardPort(port) }()
		}
	}
	return <-failed
}

func forwardPort(port string) error {
	l, err := net.Listen("tcp", "10.0.2.15:"+port)
	if err != nil {
		return err
	}
	for {
		in, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err != nil {
				return
			}
			defer out.Close()
			go func() {
				io.Copy(out, in)
				out.(*net.TCPConn).CloseWrite()
			}()
			io.Copy(in, out)
		}()
	}
}

// wipe empties the store if it is told to by a file, as `crio wipe` does after a power cut; once.
func wipe() error {
	err := os.Remove(report.WipeFile)
	if errors.Is(err, os.ErrNotExist) {
		fmt.Println("nothing to wipe")
		return nil
	} else if err != nil {
		return err
	}
	entries, err := os.ReadDir(report.Store)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(report.Store, e.Name())))
	}
	fmt.Println("wiped the store")
	return err
}

// list writes a line for everything in the store to a file: its path, and all that changes when it is written to.
func list(to string) error {
	var b strings.Builder
	err := filepath.WalkDir(report.Store, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name, _ := filepath.Rel(report.Store, path)
		_, err = fmt.Fprintf(&b, "%s: inode %d, mode %#o, %d bytes, written at %d.%09d, changed at %d.%09d\n",
			name, st.Ino, st.Mode, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)
		return err
	})
	if err != nil {
		return err
	}
	return os.WriteFile(to, []byte(b.String()), 0o644)
}

// record writes down what a service that consumes images finds when it starts.
func record(name string, args []string) error {
	r := report.Report{Name: name, At: now(), Images: map[string]bool{}, Exclusive: map[string]string{}, Files: map[string]report.File{}}
	flags := flag.NewFlagSet("record", flag.ExitOnError)
	images := flags.String("images", "", "the images, in podman's names, with commas between")
	files := flags.String("files", "", "files of the first image, with commas between")
	label := flags.String("label", "data", "the partition's label")
	flags.Parse(args)

	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	r.Boot = strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", "")
	exclusive(&r, "/dev/disk/by-partlabel/"+*label)
	for i, image := range split(*images) {
		err := exec.Command("podman", "image", "exists", image).Run()
		r.Images[image] = err == nil
		if i == 0 && err == nil && *files != "" {
			if err := look(&r, image, split(*files)); err != nil {
				r.Faults = append(r.Faults, err.Error())
			}
		}
	}
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(report.Results), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(report.Results, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	fmt.Printf("%s%s\n", report.Prefix, line)
	_, err = fmt.Fprintf(f, "%s\n", line)
	return err
}

func split(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

// now is in microseconds since the machine was started, as in the journal.
func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return ts.Nano() / 1000
}

// exclusive tries to have the partition and its disk for itself, and looks for where the partition is mounted.
func exclusive(r *report.Report, partition string) {
	device, err := filepath.EvalSymlinks(partition)
	if err != nil {
		r.Exclusive["partition"] = err.Error()
		return
	}
	disk := "?"
	if sys, err := filepath.EvalSymlinks("/sys/class/block/" + filepath.Base(device)); err == nil {
		disk = "/dev/" + filepath.Base(filepath.Dir(sys))
	}
	for what, path := range map[string]string{"partition": device, "disk": disk} {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil {
			r.Exclusive[what] = err.Error()
			continue
		}
		r.Exclusive[what] = ""
		unix.Close(fd)
	}
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo") // every namespace's
	seen := map[string]bool{}
	for _, table := range tables {
		b, _ := os.ReadFile(table)
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, " "+device+" ") && !seen[line] {
				seen[line] = true
				r.Mounted = append(r.Mounted, table+": "+strings.TrimSpace(line))
			}
		}
	}
}

// look mounts an image and looks at files in it.
func look(r *report.Report, image string, files []string) error {
	out, err := exec.Command("podman", "image", "mount", image).Output()
	if err != nil {
		return fmt.Errorf("mount image: %w", err)
	}
	root := strings.TrimSpace(string(out))
	for _, name := range files {
		var f report.File
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err == nil {
			f = report.File{Mode: st.Mode, UID: st.Uid, GID: st.Gid}
			if st.Mode&unix.S_IFMT == unix.S_IFREG {
				b, err := os.ReadFile(filepath.Join(root, name))
				if err != nil {
					return err
				}
				f.Text = string(b)
			}
		} else if err != unix.ENOENT {
			return err
		}
		r.Files[name] = f
	}
	return exec.Command("podman", "image", "unmount", image).Run()
}
