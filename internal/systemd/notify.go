// Package systemd talks to systemd: it tells it how the service is doing, and
// asks it what it knows about other units. Without systemd nothing is told and
// nothing fails.
package systemd

import (
	"fmt"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// extension is for how much longer systemd waits for READY after bytes have
// moved (sd_notify(3), EXTEND_TIMEOUT_USEC), and pause how often it is told at most.
const (
	extension = 60 * time.Second
	pause     = 5 * time.Second
)

// A Notifier tells systemd how the service is doing (sd_notify(3)). It may be
// used by any number of goroutines.
type Notifier struct {
	mu       sync.Mutex
	extended time.Time
	ready    bool
}

// Status sets what `systemctl status` shows.
func (n *Notifier) Status(format string, args ...any) {
	n.send("STATUS=" + fmt.Sprintf(format, args...))
}

// Moved is called when bytes have moved, from the partition or into the store,
// and never by a clock: systemd then waits longer, and a run that stands still
// runs into its start timeout.
func (n *Notifier) Moved() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ready || time.Since(n.extended) < pause {
		return
	}
	n.extended = time.Now()
	n.send(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", extension.Microseconds()))
}

// Ready lets the units that are ordered after the service start. Only the first call counts.
func (n *Notifier) Ready() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.ready {
		n.ready = true
		n.send(daemon.SdNotifyReady)
	}
}

func (n *Notifier) send(state string) {
	// Who does not listen misses nothing that would stop a load.
	_, _ = daemon.SdNotify(false, state)
}
