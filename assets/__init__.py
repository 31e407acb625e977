"""The Dagster assets: wiring only. One file per stage; what a stage computes is in `alignment`."""
