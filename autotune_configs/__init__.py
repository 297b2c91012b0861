"""Measured tile configurations, one folder a device; see README.md. Data only."""
