// Package mount waits for the partition, mounts it where nobody else sees it and so that nothing can be written to it,
// and hands out its root.
//
// The mount never stands in a mount namespace that lives: it is made in one of a thread's own, opened there, and the
// namespace ends with the thread. What remains hangs on the descriptor behind [Mount.Root] alone, so the kernel
// unmounts it when that is closed, by [Mount.Close] or by the process's end, SIGKILL included. This needs nothing but
// mount(2) and unshare(2), and so works alike on every kernel that a node may have; fsopen(2) and fsmount(2), which
// give the same, are missing before Linux 5.2 and in the system-call filters of older systemd.
//
// Read-only is not enough to leave a device alone. XFS replays a dirty log unless told norecovery. Ext4 writes even
// with ro and noload: it cleans up the orphan list, and notes in the superblock what damage it meets. It is
// therefore mounted through a loop device that cannot write.
package mount
