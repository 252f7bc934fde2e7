"""Running one unit: claim, heartbeat, interrupts, transactions, workspaces and child processes."""
