"""The `graft` command: a local stack in one process tree, and a client with progress bars.

Read `cli.main` for the commands. `cli.client` speaks HTTP, `cli.stack` says what the local stack
is made of, `cli.supervisor` keeps its processes alive. Redis is started here, never spoken to.
"""
