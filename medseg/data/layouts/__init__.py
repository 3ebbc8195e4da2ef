"""The ways a dataset may lie on a disk, each read into the same `Described`."""
