"""Analyse a universal perturbation: see uap_dist/jobs/analyze.py."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet in the seconds that the imports below take
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

from uap_dist.jobs.analyze import main

if __name__ == "__main__":
    main()
