package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/storage"
)

type loadFlags struct {
	src      source
	store    storage.Options
	jobs     int
	attempts int
	progress string
}

func loadCommand() *cobra.Command {
	var f loadFlags
	cmd := &cobra.Command{
		Use:   "load --from DIR [flags]",
		Short: "Load the staged images into containers-storage",
		Long: `Load every listed image into containers-storage, for podman and CRI-O to use.
What is there already is left alone; what a former run has finished is not done
again. Without storage flags, storage.conf says which store, as for podman.`,
		Example: "  precache-agent load --from /mnt/data --group ocp",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return load(cmd, f) },
	}
	f.src.flags(cmd)
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.IntVar(&f.jobs, "jobs", 0, "archives read at the same time (default: the CPUs it may use)")
	flags.IntVar(&f.attempts, "attempts", 3, "how often an image is tried when its failure may pass")
	flags.StringVar(&f.progress, "progress", "auto", "auto, bar, plain, json or none")
	storeFlags(cmd, &f.store)
	return cmd
}

// storeFlags are podman's global flags, and --policy.
func storeFlags(cmd *cobra.Command, o *storage.Options) {
	flags := cmd.Flags()
	flags.StringVar(&o.Root, "root", "", "graph root of the store, as podman's --root")
	flags.StringVar(&o.RunRoot, "runroot", "", "run root of the store, as podman's --runroot")
	flags.StringVar(&o.Driver, "storage-driver", "", "driver of the store, as podman's --storage-driver")
	flags.StringArrayVar(&o.DriverOpts, "storage-opt", nil, "option of the driver, as podman's --storage-opt; repeatable")
	flags.StringVar(&o.PolicyPath, "policy", "", "policy.json to honour (default: the system's)")
}

func load(cmd *cobra.Command, f loadFlags) (err error) {
	ctx, errw := cmd.Context(), cmd.ErrOrStderr()
	if f.jobs < 0 || f.attempts < 1 {
		return &exitError{code: exitUsage, err: errors.New("--jobs is not negative, and --attempts at least 1")}
	}
	view, err := newProgress(f.progress, cmd.OutOrStdout())
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	part, set, err := f.src.open()
	if err != nil {
		return err
	}
	defer part.Root.Close()
	if err := badLines(set); err != nil {
		return &exitError{code: exitBadList, err: fmt.Errorf("read lists: %w", err), hint: "nothing was loaded; mend the list"}
	}
	for _, warning := range set.Warnings {
		fmt.Fprintf(errw, "precache-agent: warning: %v\n", warning)
	}
	f.store.Waiting = func(holder string) {
		fmt.Fprintf(errw, "precache-agent: waiting for another precache-agent that has the store: %s\n", holder)
	}
	store, err := storage.Open(ctx, f.store)
	switch {
	case errors.Is(err, context.Canceled):
		return &exitError{code: exitInterrupted, err: err}
	case errors.Is(err, storage.ErrNeedsRoot):
		return &exitError{code: exitUnexpected, err: err, hint: "podman unshare precache-agent load ..."}
	case err != nil:
		return &exitError{code: exitUnexpected, err: err}
	}
	defer func() {
		if cerr := store.Close(); err == nil && cerr != nil {
			err = &exitError{code: exitUnexpected, err: cerr}
		}
	}()

	view.begin(part, set.Images)
	jobs := threads(f.jobs)
	sum, err := loader.Load(ctx, loader.Options{
		Images: set.Images, Partition: part, Store: store,
		Jobs: jobs, Attempts: f.attempts, Report: view.event,
	})
	view.end()
	switch {
	case err != nil && ctx.Err() != nil:
		return &exitError{code: exitInterrupted, err: err}
	case err != nil:
		return &exitError{code: exitUnexpected, err: err}
	case ctx.Err() != nil && sum.Failed > 0:
		return &exitError{code: exitInterrupted, hint: "run it again: what is finished is not done again"}
	case sum.Failed > 0:
		return &exitError{code: exitIncomplete}
	}
	return nil
}

// threads returns how many archives are read at once, the CPUs that may be
// used unless jobs says otherwise, and has the program use two threads for
// each: one inflates while the other extracts.
func threads(jobs int) int {
	if jobs == 0 {
		jobs = runtime.GOMAXPROCS(0)
	}
	jobs = min(jobs, loader.MaxJobs)
	runtime.GOMAXPROCS(2 * jobs)
	return jobs
}

var hints = map[archive.Reason]string{
	archive.MissingArchive: "stage the image again",
	archive.CorruptArchive: "stage the image again; precache-agent verify tells which are damaged",
	archive.DigestMismatch: "stage the image again; precache-agent verify tells which are damaged",
	archive.NoSpace:        "make room in the store's file system",
	archive.Policy:         "see policy.json, or --policy",
	archive.ReadFailed:     "the disk may be failing: look into the kernel's log",
}
