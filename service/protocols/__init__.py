"""Wire formats, one small module each: bytes to ScoreRequests, outcomes to bytes.

They know records and errors, and neither a web framework nor an engine.
"""
