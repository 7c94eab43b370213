"""Pure: what a version is: its manifest, how files are cut and named, tensors over blobs, records, differences."""
