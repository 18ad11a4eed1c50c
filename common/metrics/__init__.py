"""Metrics of rankings, their significance and calibration."""
