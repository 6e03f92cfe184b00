package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/metrics"
	"github.com/precache/precache-agent/internal/systemd"
)

func metricsCommand() *cobra.Command {
	var listen string
	var files []string
	var idle time.Duration
	cmd := &cobra.Command{
		Use:   "metrics [--listen ADDR]",
		Short: "Serve the metrics that the running or the last run has left",
		Long: `Serve, at /metrics, what the run that goes on or the last one has left in a text
file. It needs no privileges, starts nothing, and is started by its socket.`,
		Example: "  precache-agent metrics --listen 127.0.0.1:29617",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := systemd.Listen(listen)
			if err != nil {
				return &exitError{code: exitUnexpected, err: err}
			}
			mux := http.NewServeMux()
			mux.Handle("/metrics", metrics.Files(files...))
			server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: idle}
			stop := context.AfterFunc(cmd.Context(), func() { server.Close() })
			defer stop()
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return &exitError{code: exitUnexpected, err: fmt.Errorf("serve metrics: %w", err)}
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&listen, "listen", "", "address to listen on (default: the socket that systemd passes)")
	flags.StringArrayVar(&files, "file", []string{
		filepath.Join("/run/precache-agent", "metrics.prom"), filepath.Join("/var/lib/precache-agent", "metrics.prom"),
	}, "text file to serve, the first that there is; repeatable")
	flags.DurationVar(&idle, "idle", 30*time.Second, "how long an idle connection stays open")
	return cmd
}
