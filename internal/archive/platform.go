package archive

import (
	"runtime"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// zstdAnnotation marks the zstd instance where an index has the same platform twice (containers/image).
const zstdAnnotation = "io.github.containers.compression.zstd"

// variants are the CPU variants an instance may have to run here, best first,
// as skopeo tries them when no variant is asked for.
func variants(arch string) []string {
	switch arch {
	case "arm64":
		return []string{"v8", ""}
	case "arm":
		return []string{"", "v8", "v7", "v6", "v5"}
	}
	return []string{""}
}

// choose returns the instance that fits this machine, as skopeo would: the best
// variant, of these a zstd one, of these the first.
func choose(instances []v1.Descriptor) (v1.Descriptor, bool) {
	var best v1.Descriptor
	found := false
	for _, variant := range variants(runtime.GOARCH) {
		for _, d := range instances {
			p := d.Platform
			if p == nil || p.OS != "linux" || p.Architecture != runtime.GOARCH || p.Variant != variant {
				continue
			}
			zstd := d.Annotations[zstdAnnotation] == "true"
			if !found || zstd && best.Annotations[zstdAnnotation] != "true" {
				best, found = d, true
			}
		}
		if found {
			return best, true
		}
	}
	return best, false
}
