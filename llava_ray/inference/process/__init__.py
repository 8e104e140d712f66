"""An engine in a process of its own, beside the process that asks it."""
