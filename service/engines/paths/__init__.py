"""Forward paths: the ways of running a batch through a classifier."""
