"""Pretraining of the embedded model from scratch."""
