"""Ray clusters as YAML: their schema, a head on this machine, their cost, whether a job fits."""
