"""Exports of trained models to formats that other runtimes read."""
