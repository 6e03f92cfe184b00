package main

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/manifest"
)

func verifyCommand() *cobra.Command {
	var src source
	cmd := &cobra.Command{
		Use:   "verify --from DIR [--group NAME]...",
		Short: "Check the staged files, without a store and without root",
		Long: `Check that every listed image has its archive, that its manifest has the digest
that the reference pins, and that its config and every layer are there, with the
right digest and size. All faults are reported; exit code 3 if there are any.`,
		Example: "  precache-agent verify --from /mnt/data",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			part, set, err := src.open()
			if err != nil {
				return err
			}
			defer part.Root.Close()
			return verify(cmd, part, set)
		},
	}
	src.flags(cmd)
	return cmd
}

func verify(cmd *cobra.Command, part *archive.Partition, set *manifest.Set) error {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	faulty := len(set.Bad)
	for _, bad := range set.Bad {
		fmt.Fprintf(out, "%v\n", bad)
	}
	for _, warning := range set.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "precache-agent: warning: %v\n", warning)
	}
	results := make([]chan []error, len(set.Images))
	for i := range results {
		results[i] = make(chan []error, 1)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	next := make(chan int)
	for range min(runtime.GOMAXPROCS(0), 8) {
		wg.Go(func() {
			for i := range next {
				results[i] <- verifyImage(ctx, part, set.Images[i])
			}
		})
	}
	wg.Go(func() {
		defer close(next)
		for i := range results {
			next <- i
		}
	})
	for i, img := range set.Images {
		errs := <-results[i]
		if ctx.Err() != nil {
			return &exitError{code: exitInterrupted}
		}
		if len(errs) == 0 {
			fmt.Fprintf(out, "whole  %s\n", img.Ref)
			continue
		}
		faulty++
		for _, err := range errs {
			fmt.Fprintf(out, "faulty %s (%s:%d): %s: %v\n", img.Ref, img.File, img.Line, archive.ReasonOf(err), err)
		}
	}
	fmt.Fprintf(out, "%s, %d whole, %d faulty\n", plural(len(set.Images)+len(set.Bad), "image"), len(set.Images)+len(set.Bad)-faulty, faulty)
	if faulty > 0 {
		return &exitError{code: exitIncomplete, hint: "stage the faulty images again"}
	}
	return nil
}

func verifyImage(ctx context.Context, part *archive.Partition, img manifest.Image) []error {
	a, err := part.Find(img)
	if err != nil {
		return []error{err}
	}
	return a.Verify(ctx, img)
}
