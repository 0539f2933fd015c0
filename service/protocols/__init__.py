"""Wire formats: bytes to ScoreRequests, outcomes to bytes. Independent of the web framework and of engines."""
