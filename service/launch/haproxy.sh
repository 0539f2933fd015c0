#!/bin/sh
# Ray starts this as HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH); service/launch/haproxy.py explains it.
exec "${SERVICE_PYTHON:-python3}" -P -m service.launch.haproxy "$@"
