"""Compute universal adversarial perturbations of a classifier: see uap_dist/jobs/compute.py."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet in the seconds that the imports below take
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

from uap_dist.jobs.compute import main

if __name__ == "__main__":
    main()
