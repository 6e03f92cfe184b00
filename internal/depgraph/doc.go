// Package depgraph has only a test: who may import whom, and who alone may import what.
package depgraph
