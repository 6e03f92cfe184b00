// Package loader loads the images of a set: it plans, schedules, retries and
// reports.
//
// The unit of work is a layer: each distinct one is read and extracted once,
// by whichever archive has it first, and no worker waits for another's layer.
// It asks the store what is there through a small interface and trusts that
// alone. It does not know containers-storage, it does not read lists, and it
// does not render anything: what happens is told as events.
package loader
