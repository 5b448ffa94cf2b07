"""Faults that benchmarks/chaos.py does to jobs: a module for each kind, and the lab that they are done in."""
