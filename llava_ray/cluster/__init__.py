"""Ray clusters as YAML: their schema, a head on this machine, whether a job fits."""
