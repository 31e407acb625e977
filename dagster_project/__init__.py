"""The Dagster project: definitions, jobs, schedules, sensors, and the commands of the Makefile."""
