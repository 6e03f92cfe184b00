package systemd

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// listen is a service manager that the notifier under test talks to.
func listen(t *testing.T) func() string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		b := make([]byte, 4096)
		n, err := conn.Read(b)
		if err != nil {
			return ""
		}
		return string(b[:n])
	}
}

func TestStatus(t *testing.T) {
	next := listen(t)
	var n Notifier
	n.Status("loaded %d/%d", 41, 176)
	if got, want := next(), "STATUS=loaded 41/176"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestExtendsWhenBytesMoved(t *testing.T) {
	next := listen(t)
	var n Notifier
	n.Status("still")
	if got := next(); got != "STATUS=still" {
		t.Errorf("nothing moved, but sent %q", got)
	}
	n.Moved()
	if got := next(); !strings.HasPrefix(got, "EXTEND_TIMEOUT_USEC=") {
		t.Errorf("bytes moved, but sent %q", got)
	}
	n.Moved()
	if got := next(); got != "" {
		t.Errorf("told already, but sent %q", got)
	}
	n.extended = time.Now().Add(-pause)
	n.Moved()
	if got := next(); !strings.HasPrefix(got, "EXTEND_TIMEOUT_USEC=") {
		t.Errorf("bytes moved again, but sent %q", got)
	}
}

func TestReadyOnce(t *testing.T) {
	next := listen(t)
	var n Notifier
	n.Ready()
	n.Ready()
	n.Moved() // nobody waits any more
	if got := next(); got != "READY=1" {
		t.Errorf("got %q, want READY=1", got)
	}
	if got := next(); got != "" {
		t.Errorf("after READY it sent %q", got)
	}
}

func TestNobodyListens(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	var n Notifier
	n.Status("x")
	n.Moved()
	n.Ready()
}
