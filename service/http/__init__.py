"""HTTP: routes, middleware, request bodies, problems, the OpenAPI document and the access log."""
