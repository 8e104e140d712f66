"""What work takes: capacity of the cluster, memory, processes of its own and how they died."""
