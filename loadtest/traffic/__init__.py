"""The load of a service in use: open and closed streams, bursts, overload, and faults meanwhile."""
