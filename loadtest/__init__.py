"""Load generators and measurements of the service and its engines."""
