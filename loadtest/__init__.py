"""Load generators and comparisons that drive a running service from outside."""
