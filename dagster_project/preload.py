"""What the server that steps are forked from has done before: heavy imports, and building the job that `make demo` runs."""

from importlib import import_module

import dagster as dg

from dagster_project.jobs import alignment

for module in ("pandas", "torch", "transformers", "peft", "trl", "datasets"):
    import_module(module)
for store in ("tracking", "model_registry"):
    import_module(f"mlflow.store.{store}.sqlalchemy_store")  # seconds, which MLflow puts off until it has a database
dg.reconstructable(alignment).get_definition()  # kept by Dagster
