"""Prometheus configuration and rules, and the Grafana dashboard as code, for the metrics that the service exports."""
