"""Kernels of other packages behind our operator: never imported unless the package is there and its backend chosen.

Each guest is a module with a capability record, `missing` and the two functions of a backend. `prepare` turns a block
plan into what a guest reads, `compose` runs its full blocks on the guest and the rest on ours.
"""
