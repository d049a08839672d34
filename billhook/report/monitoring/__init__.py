"""Alerts and watches as words."""
