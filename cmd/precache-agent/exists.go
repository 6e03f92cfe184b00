package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/storage"
)

func existsCommand() *cobra.Command {
	var o storage.Options
	cmd := &cobra.Command{
		Use:   "exists IMAGE",
		Short: "Say whether an image is in the store; never fails, never removes",
		Long: `Say whether an image is in the store. It takes the place of agent-fix-bz1964591,
which agent.service runs first: it only reports, and always ends with 0.`,
		Example: "  precache-agent exists quay.io/edge-infrastructure/assisted-installer-agent:latest",
		Args:    cobra.ArbitraryArgs,
		Run: func(cmd *cobra.Command, args []string) {
			for _, name := range args {
				there, err := storage.Exists(o, name)
				switch {
				case err != nil:
					fmt.Fprintf(cmd.OutOrStdout(), "%s: not known whether it is in the store: %v\n", name, err)
				case there:
					fmt.Fprintf(cmd.OutOrStdout(), "%s: in the store\n", name)
				default:
					fmt.Fprintf(cmd.OutOrStdout(), "%s: not in the store, it has to be pulled\n", name)
				}
			}
		},
	}
	storeFlags(cmd, &o)
	return cmd
}
