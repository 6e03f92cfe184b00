package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/precache/precache-agent/internal/archive"
	"github.com/precache/precache-agent/internal/manifest"
)

// source is the flags that say what is read.
type source struct {
	from   string
	groups []string
}

func (s *source) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.from, "from", "", "folder that the images are staged in (required)")
	cmd.Flags().StringArrayVar(&s.groups, "group", nil, "group to read, the NAME of NAME-images.txt; repeatable (default: all)")
	if err := cmd.MarkFlagRequired("from"); err != nil {
		panic(err) // there is no such flag
	}
}

// open returns the folder and the set. The caller closes the folder's root.
func (s *source) open() (*archive.Partition, *manifest.Set, error) {
	path, err := filepath.Abs(s.from)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return nil, nil, &exitError{code: exitNoPartition, err: fmt.Errorf("find folder %s: %w", s.from, err), hint: "is the partition mounted?"}
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, nil, &exitError{code: exitNoPartition, err: fmt.Errorf("open folder %s: %w", s.from, err), hint: "is the partition mounted?"}
	}
	set, err := s.set(root)
	if err != nil {
		root.Close()
		return nil, nil, err
	}
	return &archive.Partition{Root: root, Path: path, Room: &archive.Room{}}, set, nil
}

func (s *source) set(root *os.Root) (*manifest.Set, error) {
	groups := s.groups
	for _, group := range groups {
		if err := manifest.CheckGroup(group); err != nil {
			return nil, &exitError{code: exitUsage, err: fmt.Errorf("--group: %w", err)}
		}
	}
	if len(groups) == 0 {
		var err error
		if groups, err = manifest.Groups(root.FS()); err != nil {
			code := exitNoPartition
			if errors.As(err, new(*manifest.ListError)) {
				code = exitBadList
			}
			return nil, &exitError{code: code, err: fmt.Errorf("look for lists: %w", err)}
		}
		if len(groups) == 0 {
			return nil, &exitError{code: exitBadList, err: fmt.Errorf("look for lists in %s: no file NAME-images.txt", s.from),
				hint: "is this the folder that the factory tool wrote to?"}
		}
	}
	set, err := manifest.Read(root.FS(), groups)
	if err != nil {
		return nil, &exitError{code: exitBadList, err: err}
	}
	return set, nil
}

// badLines is all bad lines of the lists as one error, or nil.
func badLines(set *manifest.Set) error {
	if len(set.Bad) == 0 {
		return nil
	}
	errs := make([]error, len(set.Bad))
	for i, bad := range set.Bad {
		errs[i] = bad
	}
	return errors.Join(errs...)
}

func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
