package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/ignition"
)

func siteconfigCommand() *cobra.Command {
	var f overrideFlags
	cmd := &cobra.Command{
		Use:   "siteconfig [flags] < in.yaml > out.yaml",
		Short: "Merge both Ignition overrides into a SiteConfig or ClusterInstance",
		Long: `Read a YAML stream from standard input and write it to standard output, with what
delivers the agent in every SiteConfig and ClusterInstance of it: the override for
the discovery stage in the cluster's ignitionConfigOverride, that for the install
stage in each node's, and --save-partlabel in its installerArgs. Files and units of
other origin stay in these fields; those of factory-precaching-cli are removed, and
a note says so. Nothing else changes. On an error nothing is written.
--ready-after is for the install stage.`,
		Example: "  precache-agent siteconfig --binary-file ./precache-agent < site.yaml > new.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(cmd.ErrOrStderr())
			if err != nil {
				return &exitError{code: exitUnexpected, err: err}
			}
			// What is wrong with the flags is not to be told as if it were the document's fault.
			if err := o.Check(); err != nil {
				return &exitError{code: exitUsage, err: err}
			}
			in, err := io.ReadAll(cmd.InOrStdin())
			if err != nil {
				return &exitError{code: exitUnexpected, err: fmt.Errorf("read input: %w", err)}
			}
			out, notes, err := ignition.Site(in, o)
			if err != nil {
				return &exitError{code: exitUnexpected, err: err}
			}
			for _, note := range notes {
				fmt.Fprintf(cmd.ErrOrStderr(), "precache-agent: note: %s\n", note)
			}
			_, err = cmd.OutOrStdout().Write(out)
			return writeError(err)
		},
	}
	f.add(cmd)
	return cmd
}
