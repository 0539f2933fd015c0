"""The start command, the process that supervises Ray, and what Ray is told."""
