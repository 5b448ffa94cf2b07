"""The record of a job: its MLflow run, checkpoints, output folder and console."""
