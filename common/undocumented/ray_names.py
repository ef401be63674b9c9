"""Ray: environment variables and file names that its documentation does not list.

Seen in 2.55.1, the release that Flower 1.41 and 1.42 require.
"""

LOCAL_SERVERS_LISTEN_EVERYWHERE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""``0``: the servers of a cluster that Ray starts itself listen on loopback only."""
WORKER_NICENESS = "RAY_worker_niceness"
"""Added to the niceness of every worker; 15 unless set."""
PRESTART = "RAY_prestart_worker_first_driver"
"""``0``: no worker is started for tasks: actors have workers of their own."""
HIDE_GPUS_FROM_GPULESS_WORKERS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""``0``: a worker that was given no GPU keeps its view of them."""
MEMORY = "RAY_OVERRIDE_RESOURCES"
"""JSON: bytes of ``memory`` and ``object_store_memory`` that Ray takes for the machine's."""
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""As long as the longest path of a socket that Ray makes below RAY_TMPDIR."""
RAYLET = "ray/session_latest/sockets/raylet"
"""Below RAY_TMPDIR, once a cluster that Ray has started itself is up."""
