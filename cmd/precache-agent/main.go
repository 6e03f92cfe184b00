// Command precache-agent loads staged container images into
// containers-storage. This package is flags, wiring and exit codes; what it
// does is in internal.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/storage"
)

// version is set by the linker.
var version = "development"

// memory is what the Go heap may take, in bytes, so that the process and what
// the kernel keeps for it stay below 200 MiB (docs/design.md, "Memory").
const memory = 130 << 20

func main() {
	if storage.Init() {
		return
	}
	signal.Ignore(syscall.SIGPIPE) // whoever reads the output may go away: the load goes on
	debug.SetMemoryLimit(memory)
	debug.SetGCPercent(400)         // little is live, and collecting it often is dear
	_ = time.Now().Local().String() // reads /etc/localtime while the root is still the machine's
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal ends at once
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	atExit()
	os.Exit(code)
}

var atExit = func() {} // see profile.go

// The exit codes. README.md has the same table.
const (
	exitOK          = 0   // every image is in the store, or whole on the partition
	exitUnexpected  = 1   // something else went wrong
	exitUsage       = 2   // the command line is wrong
	exitIncomplete  = 3   // some images are not in the store, or not whole
	exitNoPartition = 4   // there is no such partition or folder
	exitBadList     = 5   // a list cannot be read
	exitInterrupted = 130 // SIGINT or SIGTERM
)

// An exitError is an error with its exit code, and what the user can do about it.
type exitError struct {
	code int
	err  error // nil: all has been said
	hint string
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func run(ctx context.Context, args []string, out, errw io.Writer) int {
	cmd := rootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(out)
	cmd.SetErr(errw)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var e *exitError
	if !errors.As(err, &e) {
		e = &exitError{code: exitUsage, err: err, hint: "see precache-agent help"}
	}
	if e.err != nil {
		fmt.Fprintf(errw, "precache-agent: %v\n", e.err)
	}
	if e.hint != "" {
		fmt.Fprintf(errw, "precache-agent: hint: %s\n", e.hint)
	}
	return e.code
}

func rootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "precache-agent",
		Short:         "Load staged container images into containers-storage",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(loadCommand(), verifyCommand(), runCommand(), existsCommand(), metricsCommand(), doctorCommand(), versionCommand())
	cmd.AddCommand(ignitionCommand(), siteconfigCommand())
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintf(cmd.OutOrStdout(), "precache-agent %s\n", version) },
	}
}
