"""Hopper kernels in Gluon: what forward and backward share."""
