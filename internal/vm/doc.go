// Package vm boots a machine in a test: a small Debian with real systemd as PID 1, in QEMU, with disks that the test
// makes, and looks at it from outside.
//
//	base, err := vm.NewBase(dir)                  // from the cache, or built from the machine's own apt sources
//	root := filepath.Join(dir, "root.img")
//	err = base.NewRoot(root)                      // a copy of its own
//	err = vm.Edit(root, func(dir string) error {  // while it is off
//		return vm.Ignite(dir, config)         // with the real Ignition
//	})
//	m, err := vm.Start(vm.Config{Base: base, Root: root, Disks: []vm.Disk{{Name: "data", Path: data}}})
//	defer m.Kill()
//	err = m.Wait(time.Minute, func() bool { return ... m.Journal() ... })
//	err = m.PowerOff(time.Minute)
//
// A machine has two processors that are emulated, about 15 s from start to multi-user.target, and no network but the ports of
// [Config].Forward. Every process started here ends with the test's, and what is mounted is mounted in a namespace of a
// thread that ends with it: nothing is left, however the test ends.
//
// It needs root, amd64, Debian, and the packages that hack/setup.sh installs for tests; [Missing] says what is not there.
package vm
