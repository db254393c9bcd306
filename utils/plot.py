"""The plotter of utils/metrics/plot.py under its documented name, ``python -m utils.plot``."""

from utils.metrics.plot import main

if __name__ == "__main__":
    raise SystemExit(main())
