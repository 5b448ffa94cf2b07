"""The jobs: parse, set up, run, report. They are the commands uap-compute, uap-evaluate, … and the scripts in jobs/."""
