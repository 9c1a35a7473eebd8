"""Shows what an erasure did: seeded images with a manifest, metrics over them, intervals, a report."""
