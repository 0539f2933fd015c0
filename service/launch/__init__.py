"""The start command, the supervisor of its processes, and the environment of Ray."""
