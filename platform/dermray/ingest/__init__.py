"""Prepared corpus → training batches: a pure plan of the order, and a loader that carries it out."""
