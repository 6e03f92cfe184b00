package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/ignition"
)

// overrideFlags are the flags of ignition and siteconfig: what an override delivers.
type overrideFlags struct {
	binary, binaryFile string
	o                  ignition.Options
}

func (f *overrideFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.o.Label, "label", ignition.DefaultLabel, "label of the partition")
	flags.StringVar(&f.binary, "binary", "partition", "where the node gets the agent from: partition (its file precache-agent), or an https URL,\nwhich Ignition fetches and, if it cannot, stops the boot")
	flags.StringVar(&f.o.SHA256, "sha256", "", "hash of that binary, in hex (default: of the running program)")
	flags.StringVar(&f.binaryFile, "binary-file", "", "local copy of that binary, to compute the hash from")
	flags.StringVar(&f.o.Spec, "spec", ignition.Spec31, "version of the Ignition specification: 3.1.0 or 3.2.0")
	flags.DurationVar(&f.o.Wait, "wait", ignition.DefaultWait, "how long the node waits for the partition")
	flags.DurationVar(&f.o.Timeout, "timeout", 0, "how long a run may take (default: the agent's, which depends on the stage)")
	flags.StringVar(&f.o.ReadyAfter, "ready-after", "", "all or essential; see precache-agent run (default: the agent's)")
	cmd.MarkFlagsMutuallyExclusive("sha256", "binary-file")
}

// options completes f.o.
func (f *overrideFlags) options(errw io.Writer) (ignition.Options, error) {
	o := f.o
	if f.binary != "partition" {
		o.URL = f.binary
	}
	if o.SHA256 == "" {
		path := f.binaryFile
		if path == "" {
			var err error
			if path, err = os.Executable(); err != nil {
				return o, err
			}
			fmt.Fprintf(errw, "precache-agent: note: the node will accept no other binary than this one, %s (see --sha256)\n", path)
		}
		var err error
		if o.SHA256, err = hashFile(path); err != nil {
			return o, fmt.Errorf("hash binary: %w", err)
		}
	}
	return o, nil
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func ignitionCommand() *cobra.Command {
	var f overrideFlags
	cmd := &cobra.Command{
		Use:   "ignition --stage discovery|install [flags]",
		Short: "Print the Ignition override that delivers the agent to a node",
		Long: `Print the Ignition override of a stage, as JSON on one line: the units, and what
brings the binary to the node. It belongs into the field ignitionConfigOverride
of a cluster (discovery) or of a node (install); precache-agent siteconfig puts
it there.`,
		Example: "  precache-agent ignition --stage install --binary-file ./precache-agent > override.ign",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(cmd.ErrOrStderr())
			if err != nil {
				return &exitError{code: exitUnexpected, err: err}
			}
			override, err := ignition.Override(o)
			if err != nil {
				return &exitError{code: exitUsage, err: err}
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", override)
			return writeError(err)
		},
	}
	cmd.Flags().StringVar(&f.o.Stage, "stage", "", "the moment in the life of the node: discovery or install")
	cmd.MarkFlagRequired("stage")
	f.add(cmd)
	return cmd
}

func writeError(err error) error {
	if err != nil {
		return &exitError{code: exitUnexpected, err: fmt.Errorf("write output: %w", err)}
	}
	return nil
}
