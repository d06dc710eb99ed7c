"""Measurements. Each script prints a table and writes JSON with machine, date, versions and commit to `results/`."""
