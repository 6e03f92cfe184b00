package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/precache/precache-agent/internal/manifest"
)

// gates are the components whose images the boot of an installed node waits
// for, as mapping.txt names them after the release's version: the operating
// system, and what machine-config-daemon and the network set-up run.
var gates = []string{
	"machine-config-operator", "rhel-coreos", "rhel-coreos-8", "rhel-coreos-9", "rhel-coreos-extensions", "machine-os-content",
	"baremetal-runtimecfg", "pod", "cluster-etcd-operator", "etcd", "hyperkube",
}

// split tells the images that gate the boot from the rest: those that the file
// --essential names, or those that are gates by their names in mapping.txt. If
// none is, all are.
func (s *service) split(root *os.Root, set *manifest.Set) (essential, rest []manifest.Image, err error) {
	is, err := s.essentials(root)
	if err != nil {
		return nil, nil, err
	}
	for _, img := range set.Images {
		if is(img) {
			essential = append(essential, img)
		} else {
			rest = append(rest, img)
		}
	}
	if len(essential) == 0 {
		s.log.Warn("no image of the set is known to be essential, the boot waits for all")
		return set.Images, nil, nil
	}
	return essential, rest, nil
}

func (s *service) essentials(root *os.Root) (func(manifest.Image) bool, error) {
	if s.f.essential != "" {
		f, err := os.Open(s.f.essential)
		if err != nil {
			return nil, fmt.Errorf("read essential images: %w", err)
		}
		defer f.Close()
		entries, bad, err := manifest.ParseList(f, s.f.essential)
		if err != nil {
			return nil, fmt.Errorf("read essential images: %w", err)
		}
		if len(bad) > 0 {
			return nil, fmt.Errorf("read essential images: %w", bad[0])
		}
		refs := map[string]bool{}
		for _, e := range entries {
			refs[e.Ref] = true
		}
		return func(img manifest.Image) bool { return refs[img.Ref] }, nil
	}
	f, err := root.Open("mapping.txt")
	if os.IsNotExist(err) {
		return func(manifest.Image) bool { return false }, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read mapping.txt: %w", err)
	}
	defer f.Close()
	mapping, _, err := manifest.ParseMapping(f, "mapping.txt")
	if err != nil {
		return nil, fmt.Errorf("read mapping.txt: %w", err)
	}
	return func(img manifest.Image) bool {
		tag := mapping[img.Ref].Tag
		return slices.ContainsFunc(gates, func(gate string) bool { return tag == gate || strings.HasSuffix(tag, "-"+gate) })
	}, nil
}
