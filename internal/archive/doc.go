// Package archive reads one image out of one staged archive, and verifies it
// while reading.
//
// It knows the layouts in which an image can be staged (a dir: folder as
// skopeo writes it, an OCI image layout, a docker-archive), bare or as a tar,
// and the compressions around a tar and inside a layer. It opens archives
// through an [os.Root] and only ever reads; nothing is unpacked, members are
// streamed to whoever wants them. It does not know containers-storage, it does
// not decide what is loaded, and it does not retry.
//
// Everything in an archive is untrusted: names are matched against what the
// layout allows, sizes are bounded before anything is allocated, and every
// blob carries its own verdict at its end.
package archive
