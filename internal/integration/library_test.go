package integration

import (
	"testing"

	"github.com/containers/storage"

	"github.com/precache/precache-agent/internal/storetest"
)

// checkLibrary lets the library itself look for damage.
func checkLibrary(t *testing.T, s *storetest.Store) {
	t.Helper()
	store, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: s.Root, RunRoot: s.RunRoot, GraphDriverName: s.Driver, GraphDriverOptions: []string{"overlay.skip_mount_home=true"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := store.Shutdown(false); err != nil {
			t.Errorf("close store: %v", err)
		}
	}()
	report, err := store.Check(storage.CheckMost())
	if err != nil {
		t.Fatal(err)
	}
	for _, faults := range []map[string][]error{report.Layers, report.ROLayers, report.Images, report.ROImages, report.Containers} {
		for id, errs := range faults {
			t.Errorf("the library finds in %s: %v", id, errs)
		}
	}
}
