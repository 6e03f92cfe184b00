// Package podman asks podman, through its API socket, what it sees. It is a
// second opinion on what the agent has put into the store; it changes nothing,
// and without a socket there is none.
package podman

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"

	"github.com/containers/podman/v4/pkg/bindings"
)

// Socket is where podman.socket listens for root (podman-system-service(1)).
const Socket = "/run/podman/podman.sock"

// ErrNoSocket says that podman's API cannot be asked.
var ErrNoSocket = errors.New("podman's API socket is not there")

// Unseen returns those of the names that podman does not see as images
// (GET /libpod/images/{name}/exists). The error is ErrNoSocket if there is
// nobody to ask.
func Unseen(ctx context.Context, socket string, names []string) ([]string, error) {
	if _, err := os.Stat(socket); errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoSocket
	}
	ctx, err := bindings.NewConnection(ctx, "unix://"+socket)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	conn, err := bindings.GetClient(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	var unseen []string
	for _, name := range names {
		resp, err := conn.DoRequest(ctx, nil, http.MethodGet, "/images/%s/exists", nil, nil, name)
		if err != nil {
			return unseen, fmt.Errorf("ask podman for %s: %w", name, err)
		}
		resp.Body.Close()
		switch resp.StatusCode {
		case http.StatusNoContent:
		case http.StatusNotFound:
			unseen = append(unseen, name)
		default:
			return unseen, fmt.Errorf("ask podman for %s: %s", name, resp.Status)
		}
	}
	return unseen, nil
}
