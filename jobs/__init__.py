"""The jobs: parse, run, report. In an installed package they are `uap_dist.jobs`, and the commands uap-compute, uap-evaluate, …."""
