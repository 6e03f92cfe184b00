package storage_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/precache/precache-agent/internal/loader"
	"github.com/precache/precache-agent/internal/loader/storecontract"
	"github.com/precache/precache-agent/internal/storage"
	"github.com/precache/precache-agent/internal/storetest"
)

func TestMain(m *testing.M) {
	if storage.Init() {
		return // this process was started to extract a layer
	}
	os.Exit(m.Run())
}

func TestContract(t *testing.T) {
	t.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")) // each layer of vfs is a process, and else they sleep for a second
	for _, driver := range []string{"overlay", "vfs"} {
		t.Run(driver, func(t *testing.T) {
			at := storetest.Mount(t, storetest.Tmpfs)
			policy := filepath.Join(at, "policy.json")
			if err := os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o644); err != nil {
				t.Fatal(err)
			}
			storecontract.Run(t, func(t *testing.T) loader.Store {
				name := strings.ReplaceAll(filepath.Base(t.Name()), " ", "-")
				where := storetest.New(t, at, name, driver)
				s, err := storage.Open(t.Context(), storage.Options{Root: where.Root, RunRoot: where.RunRoot, Driver: driver, PolicyPath: policy})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := s.Close(); err != nil {
						t.Error(err)
					}
					if !t.Failed() {
						storetest.Check(t, where)
					}
				})
				return s
			})
		})
	}
}
