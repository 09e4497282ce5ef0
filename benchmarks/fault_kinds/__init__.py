"""What can happen to a run, by kind; each module adds its faults to ``lab.LAB``."""
