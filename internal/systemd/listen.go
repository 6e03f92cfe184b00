package systemd

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
)

// Listen returns a listener on a TCP address, or, without one, on the socket
// that systemd passes (sd_listen_fds(3)).
func Listen(addr string) (net.Listener, error) {
	if addr != "" {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		return l, nil
	}
	passed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take sockets from systemd: %w", err)
	}
	if len(passed) != 1 {
		return nil, fmt.Errorf("take sockets from systemd: it passed %d, want 1", len(passed))
	}
	return passed[0], nil
}
