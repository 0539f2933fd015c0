"""The HTTP side: routes, bodies, problems, the OpenAPI document and the access log."""
